"""Read any range of any value of a checkpoint, from whichever files it lies in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from deepspeed.checkpoint.manifest import Manifest, Value
from deepspeed.checkpoint.records import Block, BlockSource, Progress, RecordReader, unseen
from deepspeed.checkpoint.unpickling import load_safely
from deepspeed.errors import CheckpointError

Blocks = dict[int, set[Block]]
"""Blocks by the index of their file."""


class Reader(Protocol):
    """A checkpoint that is open for reading, whoever wrote it.

    Attributes:
        folder: of the checkpoint.
        manifest: what is in it.
        progress: is told of bytes that were read; for files that are opened from then on.
    """

    folder: Path
    manifest: Manifest
    progress: Progress

    def read(self, value: Value, start: int, out: Tensor) -> None:
        """Fill `out` (flat, any dtype and device) with a value's elements from `start` on."""

    def ask(self, value: Value, start: int, out: Tensor) -> None:
        """Fill `out` as `read` does, by the time `settle` returns."""

    def settle(self) -> None:
        """Finish what was asked for."""

    def structure(self, name: str) -> Any:
        """Return what a file holds besides the values that the manifest knows."""

    def checked(self) -> Blocks:
        """Return what was read so far, and so checked."""

    def check(self, rank: int = 0, ranks: int = 1, checked: Sequence[Blocks] = ()) -> None:
        """Check one rank's share of what is not among the blocks that all ranks have `checked`."""

    def close(self) -> None:
        """Close all files."""


class CheckpointReader:
    """A checkpoint that is open for reading.

    Args:
        folder: of the checkpoint.
        manifest: where it is not in the folder yet.
        here: read in the calling thread, which may outlive the disk's.

    Attributes:
        progress: is told of bytes that were read; for files that are opened from then on.

    Raises:
        CheckpointError: a file is missing or has another size, or the manifest is damaged.
    """

    def __init__(self, folder: Path, manifest: Manifest | None = None, *, here: bool = False) -> None:
        self._open: dict[int, RecordReader] = {}
        self._source: BlockSource | None = None
        self._here = here
        self.folder = folder
        self.manifest = Manifest.read(folder) if manifest is None else manifest
        self.progress: Progress = unseen
        for entry in self.manifest.files:
            path = folder / entry.name
            if not path.is_file():
                raise CheckpointError(f"{path}: missing")
            if path.stat().st_size != entry.size:
                raise CheckpointError(f"{path}: cut: expected {entry.size} bytes, got {path.stat().st_size}")

    def read(self, value: Value, start: int, out: Tensor) -> None:
        """Fill `out` (flat, any dtype and device) with a value's elements from `start` on.

        Raises:
            CheckpointError: what is read is not what was written.
        """
        self.ask(value, start, out)
        self.settle()

    def ask(self, value: Value, start: int, out: Tensor) -> None:
        """Fill `out` as `read` does, by the time `settle` returns; either may raise for what was asked before."""
        for place, low, high in value.overlaps(start, start + out.numel()):
            into = out[low - start : high - start]
            self._reader(place.file).ask(place.record, value.torch_dtype, low - place.start, into)

    def settle(self) -> None:
        """Finish what was asked for."""
        if self._source is not None:
            self._source.settle()

    def structure(self, name: str) -> Any:
        """Return what a file holds besides the values that the manifest knows, its tensors checked and copied.

        Args:
            name: of the file.
        """
        index = self.manifest.file_named(name)
        known = {
            place.record
            for named in self.manifest.values.values()
            for value in named.values()
            for place in value.places
            if place.file == index
        }
        reader = self._reader(index)
        for record in range(len(self.manifest.files[index].records)):
            if record not in known:
                reader.check(self.manifest.files[index].blocks_of(record))
        return load_safely(reader.path)

    def checked(self) -> Blocks:
        """Return what was read so far, and so checked."""
        return {index: reader.checked for index, reader in self._open.items()}

    def check(self, rank: int = 0, ranks: int = 1, checked: Sequence[Blocks] = ()) -> None:
        """Check one rank's share of what is not among the blocks that all ranks have `checked`."""
        for index, entry in enumerate(self.manifest.files):
            known = set[Block]().union(*(blocks.get(index, ()) for blocks in checked))
            mine = [block for block in entry.blocks() if block not in known][rank::ranks]
            if mine or index % ranks == rank:  # opening it checks the rest of it
                self._reader(index).check(mine)

    def _reader(self, index: int) -> RecordReader:
        if index not in self._open:
            entry = self.manifest.files[index]
            self._source = self._source or BlockSource(here=self._here)
            reader = RecordReader(self.folder / entry.name, entry, self._source, self.progress)
            self._open[index] = reader
            reader.check_frame()
        return self._open[index]

    def close(self) -> None:
        """Close all files; a read opens them again."""
        for reader in self._open.values():
            reader.close()
        self._open.clear()
        if self._source is not None:
            self._source.close()
        self._source = None

    __del__ = close  # of tensors that are read when they are asked for, the last one closes the files
