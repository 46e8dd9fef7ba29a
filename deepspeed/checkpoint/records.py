"""One file of a checkpoint: a torch zip file of tensors and plain containers, written and read range by range.

    file    [ frame: pickle ][ record 0 ][ frame ][ record 1 ] ... [ record n ][ frame: directory ]
    record  [ block ][ block ][ block ... ]        one tensor's values, a checksum for every block

``torch.load(path, weights_only=True, mmap=True)`` opens it; the reader here does not even unpickle: it goes by the
places of the records, which the manifest tells.

Note [Skeleton first]
``torch.save`` writes a file without the tensors' values, which then are written into their places one range after
the other. So what is on disk or on a device never has to be in memory as a whole. Values go past the page cache, which
is several times as fast as to write into it and then wait until it has been written.
"""

from __future__ import annotations

import os
import struct
import threading
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import skip_data

from deepspeed.errors import CheckpointError, OffloadError
from deepspeed.offload.buffers import ALIGNMENT, aligned_empty, aligned_size
from deepspeed.offload.disk import Disk, Pending, bytes_of
from deepspeed.offload.files import DataFile

Progress = Callable[[int], object]
"""Is told of bytes that were written or read."""

BLOCK = 2**22
"""Bytes under one checksum: what is read at least of a record of that size."""

BLOCKS_AHEAD = 4
"""Blocks that are on their way at a time."""

LARGE = 2**21
"""Bytes from which on a copy gets memory of its own: a large page."""

Block = tuple[int, int]
"""A record's index in its file, and the block's index in the record."""

_LOCAL_HEADER = 30  # bytes before the name in a zip file's header of a member


@dataclass(eq=False)
class Room:
    """A tensor in a file, whose values are written later, in order.

    Attributes:
        index: of its record, once the file has been begun.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    index: int = -1

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass
class Record:
    """Where a tensor's values are in a file, and the checksums of its blocks."""

    offset: int
    nbytes: int
    checksums: list[int] = field(default_factory=list)


@dataclass
class FileEntry:
    """What the manifest says of a file: its size, the checksum of all that is in no record, and the records."""

    name: str
    size: int
    frame: int
    records: list[Record]

    def blocks(self) -> list[Block]:
        """Return all blocks."""
        return [block for record in range(len(self.records)) for block in self.blocks_of(record)]

    def blocks_of(self, record: int) -> list[Block]:
        """Return the blocks of a record."""
        return [(record, block) for block in range(len(self.records[record].checksums))]

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        records = [[one.offset, one.nbytes, one.checksums] for one in self.records]
        return {"name": self.name, "size": self.size, "frame": self.frame, "records": records}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> FileEntry:
        """Undo `to_json`."""
        return cls(data["name"], data["size"], data["frame"], [Record(*one) for one in data["records"]])


def unseen(_nbytes: int) -> None:
    """Progress that nobody watches."""


class FileWriter:
    """Fill the rooms of a file that has been begun.

    Note [Written until they change]
        States change in an update only. A save in the background does not copy them: its thread writes them from where
        they are, the first ones first, and an update that comes before it is done copies the last ones first
        (`secure`), until the two meet. Where the disk is fast and a step long nothing is copied and nobody waits.

    Args:
        path: of the file.
        rooms: in the order of their records.
        places: offset and size of each record.
        disk: does the writing.
        later: write in `close`, which another thread may call; values that are not steady are copied until then.
        here: write in the calling thread, which may outlive the disk's.
        progress: is told of every write.
    """

    def __init__(
        self,
        path: Path,
        rooms: list[Room],
        places: list[tuple[int, int]],
        disk: Disk,
        *,
        later: bool = False,
        here: bool = False,
        progress: Progress = unseen,
    ) -> None:
        self._path, self._disk, self._progress = path, disk, progress
        self._later, self._here = later, here or later
        self._waiting: deque[tuple[Room, Tensor]] = deque()
        self._copied: deque[tuple[Room, Tensor]] = deque()  # what comes after those
        self._front, self._back = threading.Lock(), threading.Lock()  # of whoever takes from that end
        self._rooms = rooms
        self._records = [Record(*place) for place in places]
        self._filled = [0] * len(places)
        self._file = self._opened()

    def _opened(self) -> DataFile:
        """Open the file and take all its space on the disk."""
        try:
            file = DataFile(self._path, os.O_RDWR)
            file.allocate(0, file.size)
        except OffloadError as error:
            raise CheckpointError(str(error)) from None
        return file

    def append(self, room: Room, values: Tensor, *, steady: bool = False) -> None:
        """Write the next values of a room, now or later; `steady` ones do not change before `secure` is called."""
        if not self._later:
            self._write(room, values)
        elif steady:
            self._waiting.append((room, values.detach()))
        else:
            self._waiting.append((room, _copied(values)))

    def secure(self) -> None:
        """Let steady values change from now on. See note [Written until they change]."""
        with self._back:
            while self._waiting:
                with suppress(IndexError):  # the thread has just taken the last one
                    room, values = self._waiting.pop()
                    self._copied.appendleft((room, _copied(values)))
        with self._front:  # it may be writing one
            pass

    def _write_waiting(self) -> None:
        more = True
        while more:
            with self._front:
                item = self._waiting.popleft() if self._waiting else None
                if item is not None:
                    self._write(*item)
                more = item is not None
        with self._back:
            copied, self._copied = self._copied, deque()
        for item in copied:
            self._write(*item)

    def _write(self, room: Room, values: Tensor) -> None:
        data = values.detach().reshape(-1).cpu().contiguous()
        record, start = self._records[room.index], self._filled[room.index]
        self._filled[room.index] = start + data.nbytes
        try:
            if self._here:
                self._disk.write_here(self._file, record.offset + start, data)
                _add_checksums(record, start, bytes_of(data).data)
            else:
                pending = self._disk.write(self._file, record.offset + start, data)
                _add_checksums(record, start, bytes_of(data).data)
                pending.wait()
        except OffloadError as error:
            raise CheckpointError(str(error)) from None
        self._progress(data.nbytes)

    def close(self) -> FileEntry:
        """Put everything on the disk; return what the manifest has to say of the file."""
        self._write_waiting()
        for room, record, filled in zip(self._rooms, self._records, self._filled, strict=True):
            if filled != record.nbytes:
                raise CheckpointError(
                    f"{self._path}: {filled} of {room.nbytes} bytes of a tensor were written"
                )
        self._file.sync()
        with open(self._path, "rb") as file:
            frame = _frame_checksum(file.fileno(), self._file.size, self._records)
        entry = FileEntry(self._path.name, self._file.size, frame, self._records)
        self.abandon()
        return entry

    def abandon(self) -> None:
        """Close the file as it is."""
        self._file.close()
        self._waiting.clear()
        self._copied.clear()


class RecordWriter(FileWriter):
    """Write one torch zip file.

    Args:
        path: of the file; what is there is replaced.
        structure: plain containers that hold rooms and tensors. The same room or tensor may be there twice.
        disk: see `FileWriter`, as `later`, `here` and `progress`.
    """

    def __init__(
        self,
        path: Path,
        structure: Any,
        disk: Disk,
        *,
        later: bool = False,
        here: bool = False,
        progress: Progress = unseen,
    ) -> None:
        self._rooms: list[Room] = []
        self._given: list[tuple[Room, Tensor]] = []
        self._known: dict[int, tuple[Any, Tensor]] = {}
        with skip_data():
            torch.save(self._skeleton(structure), path)
        self._known.clear()
        places = _places(path)
        if [nbytes for _, nbytes in places] != [room.nbytes for room in self._rooms]:
            raise CheckpointError(f"{path}: torch.save wrote other records than expected of this structure")
        super().__init__(path, self._rooms, places, disk, later=later, here=here, progress=progress)
        for room, tensor in self._given:
            self.append(room, tensor)
        self._given.clear()

    def _skeleton(self, item: Any) -> Any:
        """Replace rooms and tensors by tensors that have no values."""
        if isinstance(item, (Room, Tensor)):
            if id(item) not in self._known:
                self._known[id(item)] = (
                    item,
                    self._place_for(item),
                )  # with the item, so that its id stays taken
            return self._known[id(item)][1]
        if isinstance(item, dict):
            return type(item)((key, self._skeleton(value)) for key, value in item.items())
        if type(item) in (list, tuple):
            return type(item)(self._skeleton(value) for value in item)
        return item

    def _place_for(self, item: Room | Tensor) -> Tensor:
        room = item if isinstance(item, Room) else Room(tuple(item.shape), item.dtype)
        room.index = len(self._rooms)
        self._rooms.append(room)
        if isinstance(item, Tensor):
            self._given.append((room, item))
        # a bare storage: torch.empty may be told to fill what it returns
        storage = torch.UntypedStorage(room.nbytes)
        strides = torch.empty(room.shape, device="meta").stride()
        return torch.empty(0, dtype=room.dtype).set_(storage, 0, room.shape, strides)


@dataclass
class _Asked:
    """A block on its way: what `pending` fills, the part of it that is the block, and who takes it."""

    pending: Pending
    data: Tensor
    take: Callable[[Tensor], None]


class BlockSource:
    """Reads blocks of any files, a few at a time: while one is looked at the others are on their way.

    Args:
        here: read in the calling thread, which may outlive the disk's.
    """

    def __init__(self, *, here: bool = False) -> None:
        self._disk, self._here = Disk(), here
        self._buffers = deque(aligned_empty(BLOCK + 2 * ALIGNMENT, torch.uint8) for _ in range(BLOCKS_AHEAD))
        self._asked: deque[_Asked] = deque()

    def ask(self, file: DataFile, begin: int, end: int, take: Callable[[Tensor], None]) -> None:
        """Begin to read bytes `begin` to `end`, which `take` gets, at `settle` at the latest.

        Raises:
            CheckpointError: those that were asked for before cannot be read, or are not what was written.
        """
        if len(self._asked) == BLOCKS_AHEAD:
            self._take_first()
        low = begin // ALIGNMENT * ALIGNMENT  # with what surrounds them in the disk's own blocks
        buffer = self._buffers[0][: min(aligned_size(end), file.size) - low]
        self._buffers.rotate(-1)
        if self._here:
            self._disk.read_here(file, low, buffer)
            pending = Pending(buffer.numel(), [])
        else:
            pending = self._disk.read(file, low, buffer)
        self._asked.append(_Asked(pending, buffer[begin - low : end - low], take))

    def settle(self) -> None:
        """Wait for all that was asked for; see `ask`."""
        while self._asked:
            self._take_first()

    def _take_first(self) -> None:
        first = self._asked.popleft()
        try:
            first.pending.wait()
            first.take(first.data)
        except BaseException as error:
            while self._asked:
                with suppress(OffloadError):
                    self._asked.popleft().pending.wait()
            if isinstance(error, OffloadError):
                raise CheckpointError(str(error)) from None
            raise

    def close(self) -> None:
        """End the threads."""
        self._disk.close()


class RecordReader:
    """Read ranges of one file's records, and check what is read.

    Args:
        path: of the file.
        entry: what the manifest says of it.
        source: does the reading, some blocks ahead.
        progress: is told of every read.

    Attributes:
        checked: blocks that were read.
    """

    def __init__(
        self, path: Path, entry: FileEntry, source: BlockSource, progress: Progress = unseen
    ) -> None:
        self.path, self._entry, self._source, self._progress = path, entry, source, progress
        try:
            self._file = DataFile(path, os.O_RDONLY)
        except OffloadError as error:
            raise CheckpointError(str(error)) from None
        self.checked: set[Block] = set()

    def check_frame(self) -> None:
        """Check the size, and everything that is in no record."""
        size = self._file.size
        if size != self._entry.size:
            raise CheckpointError(
                f"{self.path}: expected {self._entry.size} bytes, got {size}: the file was cut"
            )
        with open(self.path, "rb") as file:
            frame = _frame_checksum(file.fileno(), size, self._entry.records)
        if frame != self._entry.frame:
            raise CheckpointError(f"{self.path}: damaged: its headers are not those that were written")

    def check(self, blocks: Sequence[Block]) -> None:
        """Check what was not read yet of some blocks."""
        for block in blocks:
            if block not in self.checked:
                self._ask(block, lambda data: None)
        self._source.settle()

    def ask(self, index: int, dtype: torch.dtype, start: int, out: Tensor) -> None:
        """Fill `out` (flat, any dtype and device) with elements of a record of `dtype`, from `start` on.

        That is done when the source has settled.
        """
        first, last = start * dtype.itemsize, (start + out.numel()) * dtype.itemsize
        for block in range(first // BLOCK, -(-last // BLOCK)):
            low, high = max(first, block * BLOCK), min(last, (block + 1) * BLOCK)
            part = out[(low - first) // dtype.itemsize : (high - first) // dtype.itemsize]
            self._ask((index, block), partial(_fill, part, dtype, low - block * BLOCK))

    def _ask(self, block: Block, take: Callable[[Tensor], None]) -> None:
        """Ask for a block, which is checked before it is taken."""
        record = self._entry.records[block[0]]
        begin = record.offset + block[1] * BLOCK
        end = begin + min(BLOCK, record.nbytes - block[1] * BLOCK)

        def checked(data: Tensor) -> None:
            if zlib.crc32(bytes_of(data).data) != record.checksums[block[1]]:
                raise CheckpointError(
                    f"{self.path}: damaged: bytes {begin} to {end} are not those that were written"
                )
            self.checked.add(block)
            self._progress(data.numel())
            take(data)

        self._source.ask(self._file, begin, end, checked)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _fill(out: Tensor, dtype: torch.dtype, low: int, data: Tensor) -> None:
    """Fill `out` with what lies in a block from its byte `low` on."""
    out.copy_(data[low : low + out.numel() * dtype.itemsize].view(dtype))


def _copied(values: Tensor) -> Tensor:
    """Copy values to the host; many to memory of large pages, which takes a fraction of the time to get and fill."""
    if values.nbytes < LARGE:
        return values.detach().to("cpu", copy=True)
    return aligned_empty(values.numel(), values.dtype).copy_(values.detach().reshape(-1))


def _add_checksums(record: Record, start: int, data: memoryview) -> None:
    """Take bytes of a record, from its byte `start` on, into the checksums of its blocks."""
    while len(data):
        inside = start % BLOCK
        if inside == 0:
            record.checksums.append(0)
        part = data[: BLOCK - inside]
        record.checksums[-1] = zlib.crc32(part, record.checksums[-1])
        start, data = start + len(part), data[len(part) :]


def _places(path: Path) -> list[tuple[int, int]]:
    """Return offset and size of the records of a torch zip file, in their order."""
    found = []
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        for info in archive.infolist():
            folder, _, number = info.filename.rpartition("/")
            if folder.endswith("/data") and number.isdigit():
                file.seek(info.header_offset + _LOCAL_HEADER - 4)
                name, extra = struct.unpack("<HH", file.read(4))
                found.append((int(number), info.header_offset + _LOCAL_HEADER + name + extra, info.file_size))
    return [(offset, nbytes) for _, offset, nbytes in sorted(found)]


def _frame_checksum(file: int, size: int, records: list[Record]) -> int:
    """Return the checksum of all bytes that are in no record."""
    checksum = position = 0
    for record in [*sorted(records, key=lambda one: one.offset), Record(size, 0)]:
        while position < record.offset:
            part = os.pread(file, min(BLOCK, record.offset - position), position)
            if not part:
                return -1
            checksum, position = zlib.crc32(part, checksum), position + len(part)
        position = max(position, record.offset + record.nbytes)
    return checksum
