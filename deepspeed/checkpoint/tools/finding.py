"""Which checkpoints a folder has, which one is meant, and in what state each is by the sizes of its files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from deepspeed.checkpoint import folders
from deepspeed.checkpoint.manifest import MASTER, NAME, WEIGHT, Manifest
from deepspeed.checkpoint.opening import open_folder
from deepspeed.checkpoint.reading import CheckpointReader
from deepspeed.errors import CheckpointError, UsageError, did_you_mean

WHOLE, ORIGINAL, DAMAGED, PARTIAL = "whole", "original", "damaged", "partial"
TEMPORARY = (".partial", ".old", ".removed")
"""Endings of hidden folders; see note [A checkpoint is there or not]."""


@dataclass
class Found:
    """A checkpoint in a folder, or what a save that was killed left of one.

    Attributes:
        state: whole, or original where the original DeepSpeed wrote it (both as far as names and sizes of files
            tell); damaged; partial.
        named: `latest` names it.
        nbytes: of its files.
        written: when, in seconds since 1970.
        problem: what is wrong with it.
    """

    tag: str
    folder: Path
    state: str
    named: bool
    nbytes: int
    written: float
    manifest: Manifest | None
    problem: str = ""

    @property
    def step(self) -> int | None:
        """Updates before it was written."""
        return None if self.manifest is None else self.manifest.about.get("global_steps")

    @property
    def age(self) -> tuple[int, float]:
        """What newer ones have more of."""
        return -1 if self.step is None else self.step, self.written


def locate(path: Path, tag: str | None) -> Path:
    """Return the folder of the checkpoint that is meant: `path` itself, or one in it.

    Raises:
        UsageError: there is none; the text names the nearest.
    """
    if tag is None and is_checkpoint(path):
        return path
    if not path.is_dir():
        replaced = folders.find(path.parent, path.name)
        if replaced is not None and tag is None:
            return replaced
        near = did_you_mean(path.name, (one.name for one in _subfolders(path.parent)))
        raise UsageError(f"{path}: there is no such folder{near}")
    if tag is None:
        tag = _usual(path)
    found = folders.find(path, tag)
    if found is None:
        known = [one.tag for one in survey(path)]
        raise UsageError(f"--tag: there is no {tag!r} in {path}{did_you_mean(tag, known)}; {_choice(known)}")
    return found


def is_checkpoint(folder: Path) -> bool:
    """Whether files of a checkpoint lie in a folder, though it may be damaged."""
    return (folder / NAME).is_file() or any(folder.glob("*_states.pt"))


def survey(path: Path) -> list[Found]:
    """Return all checkpoints in a folder, the newest first.

    Raises:
        UsageError: there is no such folder.
    """
    if not path.is_dir():
        raise UsageError(f"{path}: there is no such folder")
    named: str | None = None
    with suppress(CheckpointError):
        named = folders.read_latest(path)
    found = [_examined(folder, path, named) for folder in _candidates(path)]
    return sorted(found, key=lambda one: one.age, reverse=True)


def dtype_of(manifest: Manifest) -> str:
    """Return the dtype that most weights had in the model, as far as is known."""
    numbers: Counter[str] = Counter()
    for name, about in manifest.parameters.items():
        numbers[dtype_of_weight(manifest, name)] += torch.Size(about["shape"]).numel()
    return numbers.most_common(1)[0][0] if numbers else "-"


def dtype_of_weight(manifest: Manifest, name: str) -> str:
    """Return the dtype that a weight had in the model; where that is not told, that of what was saved of it."""
    saved = (manifest.values.get(kind, {}).get(name) for kind in (WEIGHT, MASTER))
    found = (value.dtype for value in saved if value is not None)
    return manifest.parameters[name].get("dtype") or next(found, "-")


def tag_of(folder: Path) -> str:
    """Return the tag of a checkpoint from the name of its folder, also of a temporary one."""
    name = folder.resolve().name
    for ending in TEMPORARY:
        if name.startswith(".") and name.endswith(ending):
            return name[1 : -len(ending)] or "."
    return name


def _usual(path: Path) -> str:
    """Return the tag that is meant where none is given: what `latest` names, or the newest."""
    try:
        named = folders.read_latest(path)
    except CheckpointError as error:
        raise UsageError(f"{error}; {_choice([one.tag for one in survey(path)])}") from None
    if named is not None:
        return named
    whole = [one.tag for one in survey(path) if one.state != PARTIAL]
    if not whole:
        raise UsageError(f"{path}: there is no checkpoint in it")
    return whole[0]


def _choice(tags: list[str]) -> str:
    return f"choose with --tag: {', '.join(tags)}" if tags else "there is no checkpoint in it"


def _candidates(path: Path) -> Iterator[Path]:
    if is_checkpoint(path):
        yield path
    for folder in _subfolders(path):
        if _is_temporary(folder) or is_checkpoint(folder):
            yield folder


def _original(folder: Path) -> Manifest:
    """Return what a checkpoint without manifest holds if the original has written it."""
    with closing(open_folder(folder)) as reader:
        return reader.manifest


def _is_temporary(folder: Path) -> bool:
    return folder.name.startswith(".") and folder.name.endswith(TEMPORARY)


def _subfolders(path: Path) -> list[Path]:
    return sorted(one for one in path.iterdir() if one.is_dir()) if path.is_dir() else []


def _examined(folder: Path, path: Path, named: str | None) -> Found:
    tag = tag_of(folder)
    manifest: Manifest | None = None
    state, problem = WHOLE, ""
    try:
        if (folder / NAME).is_file():
            manifest = Manifest.read(folder)
            CheckpointReader(folder, manifest).close()
        else:
            manifest, state = _original(folder), ORIGINAL
    except CheckpointError as error:
        state, problem = DAMAGED, str(error)
    if _is_temporary(folder) and folder != path:
        used = folders.find(path, tag) == folder
        state = state if used else PARTIAL
        problem = "" if used else f"{folder}: left by a save that was killed, or of one that is under way"
    if folder == path and manifest is not None:
        tag = manifest.about.get("tag", tag)
    files = {NAME, *(entry.name for entry in manifest.files)} if manifest is not None else None
    sizes, times = [0], [folder.stat().st_mtime]
    for file in folder.iterdir():
        with suppress(FileNotFoundError):
            if file.is_file() and (files is None or file.name in files):
                sizes.append(file.stat().st_size)
                times.append(file.stat().st_mtime)
    is_named = tag == named and state != PARTIAL
    return Found(tag, folder, state, is_named, sum(sizes), max(times[1:] or times), manifest, problem)
