"""One checkpoint on its way to the disk: what every rank writes, and how the first one makes it a checkpoint.

    every rank    values -> its files -> part of the manifest (a small file beside them)
    first rank                            waits for all parts -> manifest -> rename -> latest -> old ones go

Note [Parts are files]
Ranks tell the first one through the folder, not through a collective, what they have written. So all of it can go on
in a thread while training goes on, and after the process group is gone: a script that ends right after it has saved
saves.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deepspeed.checkpoint import folders
from deepspeed.checkpoint.contents import Parts, values_of
from deepspeed.checkpoint.manifest import Manifest, values_from_json, values_to_json
from deepspeed.checkpoint.records import FileEntry, RecordWriter
from deepspeed.checkpoint.script import write_script
from deepspeed.checkpoint.whole import add_safetensors
from deepspeed.common.logging import logger
from deepspeed.common.progress import ByteBar
from deepspeed.errors import CheckpointError, DeepSpeedError
from deepspeed.offload.disk import Disk

POLL_S = 0.02
PART_DEADLINE_S = 1800.0
"""Seconds after which a rank whose part does not come is given up."""


@dataclass
class Commit:
    """What the first rank needs to make a checkpoint of what all ranks have written.

    Attributes:
        manifest: what it says of the run; parts are still missing.
        ranks: how many parts there are.
        latest: whether ``latest`` is to name it.
        keep_last: how many checkpoints with numbered tags stay; 0: all.
        safetensors: whether the whole weights are written as safetensors, too.
    """

    manifest: Manifest
    ranks: int
    latest: bool
    keep_last: int
    safetensors: bool


@dataclass
class Save:
    """What one rank does of a save.

    Attributes:
        folder: of checkpoints.
        tag: of this one.
        rank: of this process.
        exclude_frozen: whether weights that are not trained are left out.
        groups: names of the parameters in each param group that this rank has a part of.
        commit: on the first rank.
        bar: shows what this rank has written.
        scalars: states that are numbers.
    """

    folder: Path
    tag: str
    rank: int
    exclude_frozen: bool
    groups: list[list[str]]
    bar: ByteBar
    commit: Commit | None = None
    scalars: dict[str, dict[str, Any]] = field(default_factory=dict)
    _disk: Disk = field(default_factory=Disk, repr=False)
    _files: list[RecordWriter] = field(default_factory=list, repr=False)
    _parts: list[tuple[Parts, int]] = field(default_factory=list, repr=False)
    _thread: threading.Thread | None = field(default=None, repr=False)
    _failed: DeepSpeedError | None = field(default=None, repr=False)

    def add_file(self, name: str, structure: Any, parts: Parts, *, later: bool) -> RecordWriter:
        """Begin one of this rank's files; return what takes its values.

        Args:
            name: of the file.
            structure: see `RecordWriter`.
            parts: the values that are in it.
            later: write the values when the save is written.
        """
        path = folders.partial_folder(self.folder, self.tag) / name
        writer = RecordWriter(path, structure, self._disk, later=later, progress=self.bar.advance)
        self._parts.append((parts, len(self._files)))
        self._files.append(writer)
        return writer

    def write(self) -> None:
        """Put this rank's files on the disk, and its part of the manifest beside them.

        Raises:
            CheckpointError: they cannot be written.
        """
        part = {
            "files": [writer.close().to_json() for writer in self._files],
            "values": values_to_json(values_of(self._parts)),
            "scalars": self.scalars,
            "groups": self.groups,
        }
        self._disk.close()
        self._leave(part)

    def finish(self) -> None:
        """On the first rank, make it a checkpoint once all parts are there; elsewhere do nothing.

        Raises:
            CheckpointError: another rank could not write its files, or the folder cannot be renamed.
        """
        if self.commit is None:
            return
        manifest = self.commit.manifest
        members: list[set[str]] = []
        for rank in range(self.commit.ranks):
            part = self._part(rank)
            files = [FileEntry.from_json(entry) for entry in part["files"]]
            manifest.add(files, values_from_json(part["values"]), part["scalars"])
            members = members or [set() for _ in part["groups"]]
            for mine, theirs in zip(members, part["groups"], strict=True):
                mine.update(theirs)
        manifest.about["groups"] = [sorted(names) for names in members]
        manifest.check_complete()
        for rank in range(self.commit.ranks):
            self._path_of(rank).unlink()
        if self.commit.safetensors:
            add_safetensors(folders.partial_folder(self.folder, self.tag), manifest)
        write_script(self.folder)
        folders.commit(self.folder, self.tag, manifest, latest=self.commit.latest)
        if self.commit.keep_last:
            folders.prune(self.folder, self.commit.keep_last, self.tag)

    def abandon(self) -> None:
        """Close the files and, on the first rank, remove what is there of them."""
        for writer in self._files:
            writer.abandon()
        self._disk.close()
        if self.commit is not None:
            folders.give_up(self.folder, self.tag)

    # -- while training goes on -------------------------------------------------------------------

    def start(self, done: Callable[[], None], fleeting: RecordWriter | None) -> None:
        """Do all that is left in a thread, which the end of the process waits for.

        Args:
            done: is called if it succeeds.
            fleeting: the file whose values may change once this returns.
        """
        self._thread = threading.Thread(target=self._run, args=(done,), name="deepspeed-save")
        self._thread.start()
        if fleeting is not None:
            fleeting.secure()

    def secure(self) -> None:
        """Let the optimizer's states change from now on."""
        for writer in self._files:
            writer.secure()

    def wait(self) -> DeepSpeedError | None:
        """Wait for the thread; return what went wrong."""
        if self._thread is not None:
            self._thread.join()
        return self._failed

    def _run(self, done: Callable[[], None]) -> None:
        try:
            self.write()
            self.finish()
            done()
        except Exception as error:
            known = isinstance(error, DeepSpeedError)
            failed = error if known else CheckpointError(f"{type(error).__name__}: {error}")
            self._failed = CheckpointError(f"save_checkpoint: {self.tag}: {failed}")
            logger.error("%s", self._failed)
            with suppress(CheckpointError, OSError):
                self._leave({"error": str(failed)})
            self.abandon()

    # -- parts ------------------------------------------------------------------------------------

    def _path_of(self, rank: int) -> Path:
        return folders.partial_folder(self.folder, self.tag) / f".rank_{rank}.json"

    def _leave(self, part: dict[str, Any]) -> None:
        """Write this rank's part, whole or not at all."""
        path = self._path_of(self.rank)
        aside = path.with_suffix(".partial")
        try:
            aside.write_text(json.dumps(part))
            os.replace(aside, path)
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}") from None

    def _part(self, rank: int) -> dict[str, Any]:
        """Wait for a rank's part and return it."""
        path, deadline = self._path_of(rank), time.monotonic() + PART_DEADLINE_S
        while not path.exists():
            if not path.parent.is_dir() or time.monotonic() > deadline:
                raise CheckpointError(f"{path}: rank {rank} has not written its files")
            time.sleep(POLL_S)
        part: dict[str, Any] = json.loads(path.read_text())
        if "error" in part:
            raise CheckpointError(f"rank {rank}: {part['error']}")
        return part
