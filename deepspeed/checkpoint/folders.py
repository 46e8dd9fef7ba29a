"""Folders of checkpoints: names, the way from a temporary folder to a whole checkpoint, and back to the newest one.

    save_dir/
      latest                       the tag of the newest checkpoint
      global_step20/               manifest.json and the files it names
      .global_step30.partial/      being written, or left by a job that was killed; never read
      .global_step20.old/          for a moment, while a checkpoint is replaced by one of the same tag
      .global_step10.removed/      for a moment, while a checkpoint that is one too many goes

Note [A checkpoint is there or not]
Files are written in the temporary folder and put on the disk, the manifest last; one rename makes it the
checkpoint; then `latest` is replaced by a rename. A job that is killed at any moment leaves the last checkpoint and
a `latest` that names it.
"""

from __future__ import annotations

import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

from deepspeed.checkpoint.manifest import NAME, Manifest
from deepspeed.checkpoint.script import SCRIPT
from deepspeed.common.logging import logger
from deepspeed.errors import CheckpointError, UsageError

LATEST = "latest"
NUMBERED = re.compile(r"global_step\d+")
"""Tags that `save_checkpoint` gives where the user gives none."""
WAY_BACK = "newest whole checkpoint"


def model_file(rank: int, *, sharded: bool) -> str:
    """Name the file with a rank's weights; where they are not sharded there is one for all ranks."""
    return f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" if sharded else "mp_rank_00_model_states.pt"


def optimizer_file(rank: int, *, bf16: bool) -> str:
    """Name the file with a rank's masters and optimizer states."""
    return f"{'bf16_' if bf16 else ''}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def checked_tag(tag: str) -> str:
    """Return a tag as `latest` can name it.

    Raises:
        UsageError: it cannot be the name of a checkpoint.
    """
    if tag in (LATEST, SCRIPT) or tag != tag.strip() or "\0" in tag:
        raise UsageError(
            f"tag: expected a name other than {LATEST!r} and {SCRIPT!r}, without space around it, got {tag!r}"
        )
    return os.path.normpath(tag)


def partial_folder(save_dir: Path, tag: str) -> Path:
    """Return where a checkpoint is written before it is one."""
    target = Path(os.path.normpath(save_dir / tag))
    if target == Path(os.path.normpath(save_dir)):
        return target / ".partial"
    return target.parent / f".{target.name}.partial"


def begin(save_dir: Path, tag: str) -> Path:
    """Make an empty temporary folder."""
    folder, target = partial_folder(save_dir, tag), save_dir / tag
    save_dir.mkdir(parents=True, exist_ok=True)
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target}: a file, where the folder of the checkpoint is to be")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def commit(save_dir: Path, tag: str, manifest: Manifest, *, latest: bool) -> Path:
    """Make what is in the temporary folder the checkpoint, and `latest` name it; return its folder."""
    folder, target = partial_folder(save_dir, tag), save_dir / tag
    for entry in manifest.files:
        if not (folder / entry.name).is_file():
            raise CheckpointError(
                f"save_dir: expected one folder that every rank reaches, but {folder / entry.name} is not there; "
                "save to a file system that all machines share"
            )
    manifest.write(folder)
    _sync(folder)
    if folder.parent == Path(os.path.normpath(target)):
        _move_into(folder, target)
    elif os.path.lexists(target):
        _exchange(folder, target)
    else:
        os.rename(folder, target)
        _sync(target.parent)
        shutil.rmtree(_old(target), ignore_errors=True)
    if latest:
        _write_latest(save_dir, tag)
    return target


def prune(save_dir: Path, keep: int, saved: str) -> None:
    """Remove all but the newest `keep` whole checkpoints whose tags are numbered, ``latest``'s and `saved` never.

    One goes out of sight by a rename before anything of it is removed. Tags that a user has chosen stay, and so does
    what is damaged or a link. What cannot be removed stays, too, with a warning: the new checkpoint is whole.
    """
    with suppress(OSError):
        for left in save_dir.glob(".*.removed"):
            shutil.rmtree(left, ignore_errors=True)
    numbered = [
        tag
        for tag in whole_checkpoints(save_dir)
        if NUMBERED.fullmatch(tag) and not (save_dir / tag).is_symlink()
    ]
    try:
        kept = {saved, read_latest(save_dir)}
        for tag in numbered[keep:]:
            if tag not in kept:
                removed = save_dir / f".{tag}.removed"
                os.rename(save_dir / tag, removed)
                shutil.rmtree(removed, ignore_errors=True)
    except (CheckpointError, OSError) as error:
        logger.warning("checkpoint.keep_last: older checkpoints stay: %s", error)


def give_up(save_dir: Path, tag: str) -> None:
    """Remove what was written of a checkpoint that could not be finished."""
    shutil.rmtree(partial_folder(save_dir, tag), ignore_errors=True)


def find(load_dir: Path, tag: str) -> Path | None:
    """Return the folder of a checkpoint, or None where there is none."""
    target = Path(os.path.normpath(load_dir / tag))
    if not (target / NAME).is_file() and (_old(target) / NAME).is_file():
        return _old(target)  # a job was killed while it replaced the checkpoint
    return target if target.is_dir() else None


def read_latest(load_dir: Path) -> str | None:
    """Return the tag in `latest`, or None where there is no such file.

    Raises:
        CheckpointError: it is empty, or names nothing that is there.
    """
    path = load_dir / LATEST
    try:
        tag = path.read_text().strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    if not tag:
        raise CheckpointError(f"{path}: empty")
    found = None
    with suppress(OSError):  # no name of a file
        found = find(load_dir, tag)
    if found is None:
        raise CheckpointError(f"{path}: names {tag!r}, which is not there")
    return tag


def whole_checkpoints(load_dir: Path) -> list[str]:
    """Return the tags of checkpoints whose manifest and files are there, the newest first."""
    found = []
    with suppress(OSError):
        for folder in load_dir.iterdir():
            with suppress(CheckpointError, OSError):
                manifest = Manifest.read(folder)
                whole = all((folder / entry.name).stat().st_size == entry.size for entry in manifest.files)
                if whole and not folder.name.startswith("."):
                    found.append((manifest.about.get("global_steps", 0), folder.stat().st_mtime, folder.name))
    return [name for _, _, name in sorted(found, reverse=True)]


def way_back(tags: list[str], load_dir: Path) -> str:
    """Say which checkpoint to load instead, the first of `tags`."""
    if not tags:
        return f"{WAY_BACK}: none, there is no other in {load_dir}"
    return f'{WAY_BACK}: tag="{tags[0]}" in {load_dir}'


def _old(target: Path) -> Path:
    return target.parent / f".{target.name}.old"


def _exchange(folder: Path, target: Path) -> None:
    """Put a new checkpoint in the place of an old one of the same tag; files of others stay."""
    old = _old(target)
    _remove(old)
    own = {NAME}
    with suppress(CheckpointError):
        own |= {entry.name for entry in Manifest.read(target).files}
    os.rename(target, old)
    os.rename(folder, target)
    for path in () if old.is_symlink() else old.iterdir():  # what a link names is of others
        if path.name not in own and not (target / path.name).exists():
            os.rename(path, target / path.name)
    _sync(target)
    _sync(target.parent)
    _remove(old)


def _remove(folder: Path) -> None:
    """Remove a folder, or a link to one but not what it names."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def _move_into(folder: Path, target: Path) -> None:
    """Move the files of a checkpoint to where others may be, the manifest last."""
    for path in sorted(folder.iterdir(), key=lambda one: one.name == NAME):
        os.replace(path, target / path.name)
    folder.rmdir()
    _sync(target)


def _write_latest(save_dir: Path, tag: str) -> None:
    aside = save_dir / f".{LATEST}.partial"
    with open(aside, "w") as file:
        file.write(tag)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, save_dir / LATEST)
    _sync(save_dir)


def _sync(folder: Path) -> None:
    """Put a folder's names on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
