"""Whole weights in files that others read: safetensors or torch files, several with an index where one is too large.

    model.safetensors                      or, of more than max_bytes,
    model-00001-of-00002.safetensors       as many tensors, in their order, as fit
    model-00002-of-00002.safetensors
    model.safetensors.index.json           {"metadata": {"total_size": ...}, "weight_map": {name: file}}

The names are Hugging Face's. Values are written as they come, a range of one tensor after the other.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepspeed.checkpoint.records import FileEntry, FileWriter, RecordWriter, Room
from deepspeed.checkpoint.safetensors_file import SafetensorsWriter
from deepspeed.errors import UsageError
from deepspeed.offload.disk import Disk

STEP = 2**23
"""Elements that are read and written at once."""

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@dataclass(frozen=True)
class Entry:
    """A tensor that is to be written.

    Attributes:
        names: all of its names; safetensors holds the first one only.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def size_in_bytes(size: int | str | None) -> int | None:
    """Read ``max_shard_size``: bytes, or text such as ``5GB`` or ``200MB`` (powers of 1000); None: no limit."""
    found = re.fullmatch(r"\s*(\d+)\s*([KMGT]?)(I?)B?\s*", str(size).upper())
    if size is None:
        return None
    if found is None or int(found[1]) == 0 or (found[3] and not found[2]):
        raise UsageError(f"max_shard_size: expected bytes or a size such as '5GB' or '200MB', got {size!r}")
    return int(found[1]) * (2 ** (10 * list(UNITS).index(found[2])) if found[3] else UNITS[found[2]])


class WeightFiles:
    """Write whole weights to a folder; each file is written aside, and all are renamed at the end.

    Args:
        folder: is made.
        name: of the file if it is only one: safetensors if it ends so, else ``torch.save``'s format.
        entries: what will be written, in this order.
        max_bytes: of the values in a file; a larger tensor has a file of its own.
        more: what a torch file holds beside tensors.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        entries: Sequence[Entry],
        *,
        max_bytes: int | None = None,
        more: dict[str, Any] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path, self._more = folder / name, more or {}
        self._safe = self._path.suffix == ".safetensors"
        self._shards = _shards(entries, max_bytes)
        self._shard_of = {
            entry.names[0]: index for index, shard in enumerate(self._shards) for entry in shard
        }
        self._disk = Disk()
        self._done: list[FileEntry] = []
        self._rooms: dict[str, Room] = {}
        self._writer: FileWriter | None = None

    @property
    def names(self) -> list[str]:
        """The names of the files with weights."""
        count = len(self._shards)
        if count == 1:
            return [self._path.name]
        stem, suffix = self._path.stem, self._path.suffix
        return [f"{stem}-{number:05}-of-{count:05}{suffix}" for number in range(1, count + 1)]

    def append(self, name: str, values: Tensor) -> None:
        """Write the next values of a tensor, by its first name; tensors come in the order of the entries."""
        self._go_on_to(self._shard_of[name])
        assert self._writer is not None
        for part in values.detach().reshape(-1).split(STEP):
            self._writer.append(self._rooms[name], part)

    def finish(self) -> list[FileEntry]:
        """Put everything in its place; return what a manifest has to say of the files."""
        self._go_on_to(len(self._shards) - 1)
        self._end_file()
        files = self._done
        if len(self._shards) > 1:
            files = [*files, self._write_index()]
        for entry in files:
            os.replace(self._aside(entry.name), self._path.with_name(entry.name))
        self._remove_others({entry.name for entry in files})
        return files

    def abandon(self) -> None:
        """Close everything and remove what is not finished."""
        if self._writer is not None:
            self._writer.abandon()
        self._disk.close()
        for name in (*self.names, self._index):
            with suppress(OSError):  # a disk that cannot be written: why is told elsewhere
                self._aside(name).unlink()

    @property
    def _index(self) -> str:
        return f"{self._path.name}.index.json"

    def _aside(self, name: str) -> Path:
        return self._path.with_name(f".{name}.{os.getpid()}.partial")

    def _go_on_to(self, shard: int) -> None:
        while self._writer is None or len(self._done) < shard:
            if self._writer is not None:
                self._end_file()
            self._begin_file(len(self._done))

    def _begin_file(self, shard: int) -> None:
        path = self._aside(self.names[shard])
        self._rooms = {entry.names[0]: Room(entry.shape, entry.dtype) for entry in self._shards[shard]}
        if self._safe:
            self._writer = SafetensorsWriter(path, self._rooms, self._disk, here=True)
            return
        structure: dict[str, Any] = {
            name: self._rooms[entry.names[0]] for entry in self._shards[shard] for name in entry.names
        }
        structure |= self._more if shard == 0 else {}
        self._writer = RecordWriter(path, structure, self._disk, here=True)

    def _end_file(self) -> None:
        assert self._writer is not None
        self._done.append(replace(self._writer.close(), name=self.names[len(self._done)]))
        self._writer = None

    def _write_index(self) -> FileEntry:
        weight_map = {
            name: file
            for file, shard in zip(self.names, self._shards, strict=True)
            for entry in shard
            for name in (entry.names[:1] if self._safe else entry.names)
        }
        total = sum(entry.nbytes for shard in self._shards for entry in shard)
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2).encode()
        with open(self._aside(self._index), "wb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        return FileEntry(self._index, len(text), zlib.crc32(text), [])

    def _remove_others(self, written: set[str]) -> None:
        """Remove files of an earlier export, which readers might take for these."""
        stem, suffix = re.escape(self._path.stem), re.escape(self._path.suffix)
        ours = re.compile(rf"{stem}(-\d{{5}}-of-\d{{5}})?{suffix}|{re.escape(self._index)}")
        for path in self._path.parent.iterdir():
            if ours.fullmatch(path.name) and path.name not in written:
                with suppress(FileNotFoundError):
                    path.unlink()


def _shards(entries: Sequence[Entry], max_bytes: int | None) -> list[list[Entry]]:
    """Cut the tensors into files."""
    shards: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        if shards[-1] and max_bytes is not None and filled + entry.nbytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += entry.nbytes
    return shards
