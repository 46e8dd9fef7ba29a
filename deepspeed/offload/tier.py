"""A tier on disk: tensors that are in memory only while somebody works on them.

    parcel   tensors that travel together, back to back in one extent of a swap file
    buffer   aligned memory that holds a parcel while it is here

Note [Reading ahead, writing behind]
`prefetch` starts a read and `put` a write, and neither waits. A buffer belongs to the request that uses it until
that is done, so there are never more buffers than asked for, except where the work in hand itself needs more.
A write that failed is known when its buffer is wanted again, or at `drain`, whichever comes first, and noted: no
parcel is brought in from then on.

Note [Buffers remember]
A buffer whose parcel is away and unchanged on the disk keeps its contents until it is needed for another one, the
longest unused first; a parcel that is fetched before that is not read. Whoever goes over all parcels time and again
does well to turn round each time: then the last of one round are the first of the next.

Note [Failures wait for all ranks]
A rank that raises in the middle of a backward leaves the others in a collective. Where that could be, the failure
is noted (`noting_failure`), nothing more is written, and the next step raises it on every rank.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from deepspeed.accelerator.heap import trim_heap
from deepspeed.comm.agreement import raise_together
from deepspeed.errors import OffloadError
from deepspeed.offload.buffers import aligned_empty, aligned_size
from deepspeed.offload.disk import Disk, Pending
from deepspeed.offload.files import DataFile
from deepspeed.offload.swap import Extent, SwapFolder

TRIM_EVERY = 2**27
"""Bytes that are copied to buffers, from what is in the heap, between two trims of it."""


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in its parcel, and what it looks like."""

    offset: int
    shape: torch.Size
    dtype: torch.dtype

    def of(self, buffer: Tensor) -> Tensor:
        """View the tensor in a buffer of bytes."""
        nbytes = self.shape.numel() * self.dtype.itemsize
        return buffer[self.offset : self.offset + nbytes].view(self.dtype).view(self.shape)


@dataclass(eq=False)
class Parcel:
    """Tensors whose memory a tier gives and takes; they stay the same objects.

    Attributes:
        tensors: empty while the parcel is away.
    """

    tensors: list[Tensor] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    extent: Extent | None = None
    buffer: Tensor | None = None
    reading: Pending | None = None
    is_here: bool = True

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return 0 if self.extent is None else self.extent.nbytes


class NotesFailure:
    """Keeps the first OffloadError for a moment when all ranks raise it. See note [Failures wait for all ranks].

    It is kept as text: the error itself would keep the frames it was raised in, and the graphs in them.
    """

    _noted: str | None = None

    @property
    def noted_failure(self) -> OffloadError | None:
        """The error, new each time, or None."""
        return None if self._noted is None else OffloadError(self._noted)

    @contextmanager
    def noting_failure(self) -> Iterator[None]:
        """Note an OffloadError inside instead of raising it."""
        try:
            yield
        except OffloadError as error:
            self.note(error)

    def note(self, error: OffloadError) -> None:
        """Keep an error, if it is the first."""
        self._noted = self._noted or str(error)


class DiskTier(NotesFailure):
    """Parcels in a swap folder, and the buffers they pass through.

    Args:
        disk: does the reading and writing.
        folder: where the swap files are.
        buffers: how many to hold at most; at least 2, to work on one while another moves.
        pin: page-locked buffers, where there is a device.

    """

    def __init__(self, disk: Disk, folder: SwapFolder, *, buffers: int = 4, pin: bool = False) -> None:
        self.disk, self._folder, self._pin = disk, folder, pin
        self._limit = max(2, buffers)
        self._made = self._untrimmed = 0
        self._free: list[Tensor] = []
        self._kept: dict[Parcel, Tensor] = {}  # see note [Buffers remember]
        self._beside: list[DiskTier] = []
        self._writing: deque[tuple[Pending, Tensor, Parcel | None]] = deque()

    @property
    def nbytes(self) -> int:
        """Bytes of memory in buffers."""
        busy = [buffer for _, buffer, _ in self._writing]
        return sum(one.numel() for one in (*self._free, *self._kept.values(), *busy)) + sum(
            one.nbytes for one in self._beside
        )

    @property
    def failure(self) -> OffloadError | None:
        """What went wrong where nobody could raise it."""
        found = (one.noted_failure for one in (self, *self._beside))
        return next((one for one in found if one is not None), None)

    def beside(self, buffers: int) -> DiskTier:
        """Return a tier in the same files that has buffers of its own, for parcels of another size."""
        tier = DiskTier(self.disk, self._folder, buffers=buffers, pin=self._pin)
        self._beside.append(tier)
        return tier

    # -- parcels ----------------------------------------------------------------------------------

    def put(self, parcel: Parcel, tensors: Sequence[Tensor] | None = None) -> None:
        """Write a parcel and take its memory.

        Args:
            parcel: one that is here.
            tensors: what it holds from now on; None: what it held.
        """
        self._settle(parcel)
        if tensors is not None:
            parcel.tensors = list(tensors)
        if not parcel.tensors:
            return
        buffer = self._packed(parcel)
        assert parcel.extent is not None
        pending = self.disk.write(parcel.extent.file, parcel.extent.offset, buffer[: parcel.extent.nbytes])
        self._writing.append((pending, buffer, parcel))
        self._leave(parcel)
        if self._untrimmed >= TRIM_EVERY:
            self._untrimmed = 0
            trim_heap()

    def keep(self, parcel: Parcel) -> None:
        """Take the memory of a parcel that did not change since it was fetched."""
        if parcel.buffer is not None and parcel.is_here:
            self._kept[parcel] = parcel.buffer
            self._leave(parcel)

    def prefetch(self, parcel: Parcel) -> None:
        """Begin to read a parcel, if it has to be read and there is a buffer for it."""
        at_hand = parcel.is_here or parcel in self._kept or self._is_written(parcel)
        if not at_hand and parcel.reading is None:
            buffer = self._take_now(parcel.nbytes)
            if buffer is not None:
                self._read(parcel, buffer)

    def fetch(self, parcel: Parcel) -> None:
        """Bring a parcel in.

        Raises:
            OffloadError: it cannot be read, or something could not be written and is not what it should be.
        """
        if self.noted_failure is not None:  # a parcel that is here may have got nothing
            raise self.noted_failure
        if parcel.is_here:
            return
        if parcel.reading is None and not self._recall(parcel):
            self._read(parcel, self._take(parcel.nbytes))
        if parcel.reading is not None:
            parcel.reading.wait()
            parcel.reading = None
        assert parcel.buffer is not None
        parcel.is_here = True
        for tensor, place in zip(parcel.tensors, parcel.places, strict=True):
            tensor.data = place.of(parcel.buffer)

    @contextmanager
    def holding(self, parcel: Parcel, *, changed: bool) -> Iterator[None]:
        """Have a parcel here inside; what was `changed` is written back. One that is here stays here."""
        was_here = parcel.is_here
        self.fetch(parcel)
        yield
        if was_here:
            return
        if changed:
            self.put(parcel)
        else:
            self.keep(parcel)

    def drop(self, parcel: Parcel) -> None:
        """Forget a parcel, with its place on the disk; tensors that are here stay as they are."""
        self._settle(parcel)
        if parcel.buffer is not None:
            self._made -= 1  # its tensors keep it
        if parcel.extent is not None:
            self._folder.free(parcel.extent)
        parcel.extent = parcel.buffer = None
        parcel.is_here = True

    def drain(self) -> None:
        """Wait for all writes.

        Raises:
            OffloadError: one failed.
        """
        while self._writing:
            self._finish_write()
        for tier in self._beside:
            tier.drain()

    def close(self) -> None:
        """Give everything back: threads, files, memory. Tensors that are away stay empty."""
        with suppress(OffloadError):
            self.drain()
        self.disk.close()
        self._folder.close()
        for tier in (self, *self._beside):
            tier._free.clear()
            tier._kept.clear()

    # -- ranges of a file -------------------------------------------------------------------------

    def reserve(self, nbytes: int) -> Extent:
        """Return space in the tier's file (OffloadError: there is none)."""
        return self._folder.reserve(nbytes)

    def free(self, extent: Extent) -> None:
        """Give space back."""
        self._folder.free(extent)

    @property
    def file(self) -> DataFile:
        """Where extents lie."""
        return self._folder.file

    @contextmanager
    def written_behind(self, extent: Extent, start: int, nbytes: int) -> Iterator[Tensor]:
        """Give a buffer of bytes, written at the end to the extent from its byte `start` on; `drain` waits for it."""
        buffer = self._take(nbytes)
        try:
            yield buffer[:nbytes]
        except BaseException:
            self._give(buffer)
            raise
        pending = self.disk.write(extent.file, extent.offset + start, buffer[:nbytes])
        self._writing.append((pending, buffer, None))

    def read(self, file: DataFile, offset: int, target: Tensor) -> Pending | ReadThroughHost:
        """Begin to fill `target`, contiguous and on any device, from byte `offset` of a file."""
        if target.device.type == "cpu":
            return self.disk.read(file, offset, target)
        nbytes = target.numel() * target.element_size()
        buffer = self._take(nbytes)
        pending = self.disk.read(file, offset, buffer[:nbytes])
        return ReadThroughHost(pending, buffer, target, self._give)

    # -- inside -----------------------------------------------------------------------------------

    def _packed(self, parcel: Parcel) -> Tensor:
        """Return a buffer with the parcel's tensors in their places; the one they are in already, if they are."""
        places, nbytes = _places(parcel.tensors)
        if parcel.extent is None or parcel.extent.nbytes < nbytes:
            if parcel.extent is not None:
                self._folder.free(parcel.extent)
                parcel.extent = None
            parcel.extent = self._folder.reserve(nbytes)
        old = parcel.buffer
        if old is not None and places == parcel.places and _lie_in(old, parcel):
            return old
        buffer = self._take(nbytes)
        for tensor, place in zip(parcel.tensors, places, strict=True):
            place.of(buffer).copy_(tensor)
        self._untrimmed += nbytes
        if old is not None:
            self._free.append(old)
        parcel.places = places
        return buffer

    def _leave(self, parcel: Parcel) -> None:
        parcel.buffer, parcel.is_here = None, False
        for tensor in parcel.tensors:
            tensor.data = tensor.new_empty(0)

    def _is_written(self, parcel: Parcel) -> bool:
        return any(one is parcel for _, _, one in self._writing)

    def _recall(self, parcel: Parcel) -> bool:
        """Give a parcel its contents from memory; False if no buffer has them."""
        while self._is_written(parcel):
            self._finish_write()
        parcel.buffer = self._kept.pop(parcel, None)
        return parcel.buffer is not None

    def _read(self, parcel: Parcel, buffer: Tensor) -> None:
        assert parcel.extent is not None
        parcel.buffer = buffer
        parcel.reading = self.disk.read(
            parcel.extent.file, parcel.extent.offset, buffer[: parcel.extent.nbytes]
        )

    def _take(self, nbytes: int) -> Tensor:
        """Return a buffer of at least `nbytes`, waiting for one if there are enough of them."""
        buffer = self._take_now(nbytes)
        while buffer is None:
            if not self._writing:  # all of them are in use by the work in hand
                return self._make(nbytes)
            self._finish_write()
            buffer = self._take_now(nbytes)
        return buffer

    def _take_now(self, nbytes: int) -> Tensor | None:
        while self._writing and self._writing[0][0].done():
            self._finish_write()
        fitting = [one for one in self._free if one.numel() >= nbytes]
        if fitting:
            best = min(fitting, key=Tensor.numel)
            self._free = [one for one in self._free if one is not best]
            return best
        if self._made < self._limit:
            return self._make(nbytes)
        if self._free:  # too small for what is wanted now
            self._free.pop()
            self._made -= 1
        elif self._kept:
            self._free.append(self._kept.pop(next(iter(self._kept))))
        else:
            return None
        return self._take_now(nbytes)

    def _make(self, nbytes: int) -> Tensor:
        self._made += 1
        return aligned_empty(nbytes, torch.uint8, pin=self._pin)

    def _give(self, buffer: Tensor) -> None:
        self._free.append(buffer)

    def _finish_write(self) -> None:
        pending, buffer, parcel = self._writing.popleft()
        try:
            pending.wait()
        except OffloadError as error:
            self.note(error)  # who meets it may go on, and the disk has something else
            self._free.append(buffer)
            raise
        if parcel is None:
            self._free.append(buffer)
        else:
            self._kept[parcel] = buffer

    def _settle(self, parcel: Parcel) -> None:
        """Wait until nothing of a parcel is under way; what was read ahead or is remembered is forgotten."""
        if parcel.is_here:
            return
        if parcel.reading is not None:
            parcel.reading.wait()
            parcel.reading = None
        else:
            self._recall(parcel)
        if parcel.buffer is not None:
            self._free.append(parcel.buffer)
            parcel.buffer = None


class ReadThroughHost:
    """A read for a device: on its way to a buffer, and copied from there when it is waited for."""

    def __init__(
        self, pending: Pending, buffer: Tensor, target: Tensor, give: Callable[[Tensor], None]
    ) -> None:
        self._pending, self._buffer, self._target, self._give = pending, buffer, target, give

    def wait(self) -> None:
        """Return when the target is filled; raise OffloadError if it cannot be."""
        try:
            nbytes = self._pending.wait()
            self._target.copy_(self._buffer[:nbytes].view(self._target.dtype).view(self._target.shape))
        finally:
            self._give(self._buffer)


def open_tier(
    path: str, disk: Disk, *, buffers: int, pin: bool, rank: int, group: dist.ProcessGroup | None
) -> DiskTier:
    """Make a tier in a folder of this rank's own below `path`. All ranks of `group` call it.

    Raises:
        OffloadError: any rank cannot use its folder.
    """
    folder, error = None, None
    try:
        folder = SwapFolder(path, rank)
    except OffloadError as found:
        error = found
    raise_together(error, group)
    assert folder is not None
    return DiskTier(disk, folder, buffers=buffers, pin=pin)


def _places(tensors: Iterable[Tensor]) -> tuple[list[Place], int]:
    places, offset = [], 0
    for tensor in tensors:
        places.append(Place(offset, tensor.shape, tensor.dtype))
        offset += aligned_size(tensor.numel() * tensor.element_size())
    return places, offset


def _lie_in(buffer: Tensor, parcel: Parcel) -> bool:
    start = buffer.data_ptr()
    return all(
        tensor.data_ptr() == start + place.offset
        for tensor, place in zip(parcel.tensors, parcel.places, strict=True)
    )
