"""Read any range of any value of a checkpoint, from whichever files it lies in."""

from __future__ import annotations

import bisect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepspeed.checkpoint.manifest import Manifest, Value
from deepspeed.checkpoint.records import Progress, RecordReader, unseen
from deepspeed.errors import CheckpointError


class CheckpointReader:
    """A checkpoint that is open for reading.

    Args:
        folder: of the checkpoint.
        manifest: where it is not in the folder yet.

    Attributes:
        progress: is told of bytes that were read; for files that are opened from then on.

    Raises:
        CheckpointError: a file is missing or has another size, or the manifest is damaged.
    """

    def __init__(self, folder: Path, manifest: Manifest | None = None) -> None:
        self.folder = folder
        self.manifest = Manifest.read(folder) if manifest is None else manifest
        self.progress: Progress = unseen
        self._open: dict[int, RecordReader] = {}
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
        stop, dtype = start + out.numel(), value.torch_dtype
        first = bisect.bisect_right(value.places, start, key=lambda place: place.start) - 1
        for place in value.places[max(first, 0) :]:
            low, high = max(start, place.start), min(stop, place.start + place.numel)
            if low >= stop:
                break
            if low < high:
                reader = self._reader(place.file)
                reader.read(place.record, dtype, low - place.start, out[low - start : high - start])

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
                reader.check(record)
        return torch.load(reader.path, weights_only=True, mmap=True, map_location="cpu")

    def check(self, rank: int = 0, ranks: int = 1) -> None:
        """Check what was not read yet of one rank's share of the files."""
        for index, entry in enumerate(self.manifest.files):
            if index * ranks // len(self.manifest.files) == rank:
                for record in range(len(entry.records)):
                    self._reader(index).check(record)

    def _reader(self, index: int) -> RecordReader:
        if index not in self._open:
            entry = self.manifest.files[index]
            reader = RecordReader(self.folder / entry.name, entry, self.progress)
            self._open[index] = reader
            reader.check_frame()
        return self._open[index]

    def close(self) -> None:
        """Close all files."""
        for reader in self._open.values():
            reader.close()
        self._open.clear()
