"""What a rank holds of a unit between uses, and how the whole is made of it.

flat     [ rank 0 | rank 1 | rank 2 ]     a row for each rank of the spread group, a chunk for each of the hold group
held              [ rank 1 ]              this rank's chunk of each row
mine              [ rank 1 ]              that of its own row: its shard

    Held          where the flat is, or the flat itself where parameters stay whole; gathers are collectives
    HeldInArena   memory that the other ranks of the host read by themselves
    HeldOnHost    the host's memory, where the flat is on a device
    HeldOnDisk    an extent of a swap file, one in the same place for each rank of the host

What is not where the flat is has one row: nobody spreads copies of what shall leave the memory.

Note [Who may read while somebody writes]
Ranks that read alone do so at any time. So who writes calls `settle` before and after (`Unit.changing`), or does
it in a step, where all ranks meet before the first update and after the last one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from deepspeed import comm
from deepspeed.comm.agreement import raise_together
from deepspeed.comm.arena import Block
from deepspeed.errors import OffloadError
from deepspeed.offload.buffers import aligned_empty
from deepspeed.offload.files import DataFile
from deepspeed.offload.swap import Extent
from deepspeed.offload.tier import DiskTier
from deepspeed.zero.stage import RankGroup, Sharding


class Waitable(Protocol):
    """Something under way."""

    def wait(self) -> object:
        """Return when it is done."""


class Held:
    """Memory where the flat is; gathers are collectives.

    Args:
        rows: (spread ranks, chunk), contiguous.
        sharding: the groups of ranks.
        label: what errors between ranks call the unit.

    Attributes:
        mine: this rank's shard; None where it is not on the flat's device.
        reads_alone: whether this rank can read what others hold without their help.
        reads_ahead: whether a gather that was started goes on by itself.
        nbytes: of memory, the flat's own included where it is held.
        nbytes_on_disk: of disk.
    """

    reads_alone = False
    reads_ahead = True
    nbytes_on_disk = 0

    def __init__(self, rows: Tensor, sharding: Sharding, label: str) -> None:
        self._rows, self._sharding, self._label = rows, sharding, label
        self.mine: Tensor | None = rows[sharding.spread_group.rank]

    @property
    def nbytes(self) -> int:
        return self._rows.numel() * self._rows.element_size()

    @property
    def movable(self) -> list[Tensor]:
        """What may be moved elsewhere for a while."""
        return [self._rows]

    def start(self, rows: Tensor) -> list[Waitable]:
        """Begin to fill the rows of a flat (spread ranks, hold ranks, chunk); what is returned is waited for."""
        group = self._sharding.hold_group.process_group
        return [
            comm.start_all_gather(row.view(-1), own, group=group, label=self._label)
            for row, own in zip(rows, self._rows, strict=True)
        ]

    def read(self, rank: int, start: int, target: Tensor) -> None:
        """Fill `target` with what a rank of the hold group has from `start` on, counted over all rows.

        Args:
            rank: this one, or any where `reads_alone`.
            start: first element.
            target: contiguous, of the storage dtype.
        """
        target.copy_(self._rows.view(-1)[start : start + target.numel()])

    def write(self, start: int, values: Tensor) -> None:
        """Set what this rank has from `start` on, counted over all rows."""
        self._rows.view(-1)[start : start + values.numel()] = values

    def read_mine(self, start: int, stop: int) -> Tensor:
        """Return a range of this rank's shard: a view where it is in memory."""
        return self._rows[self._sharding.spread_group.rank, start:stop]

    def write_mine(self, start: int, values: Tensor) -> None:
        """Set this rank's shard from `start` on."""
        self.write(self._sharding.spread_group.rank * self._rows.shape[-1] + start, values)

    def writing(self, start: int, stop: int, device: torch.device) -> AbstractContextManager[Tensor]:
        """Give a tensor on `device` for new values of a range of this rank's shard; they are kept at the end."""
        return nullcontext(self.read_mine(start, stop))

    def spread(self, label: str) -> dist.Work | None:
        """Begin to send this rank's shard to the ranks that hold a copy of it."""
        group = self._sharding.spread_group
        if group.size == 1:
            return None
        work: dist.Work = comm.start_all_gather(
            self._rows.view(-1), self._rows[group.rank], group=group.process_group, label=label
        )
        return work

    @property
    def failure(self) -> OffloadError | None:
        """What went wrong and makes what is held useless."""
        return None

    def drain(self) -> None:
        """Wait until what this rank wrote is where it belongs (OffloadError: it cannot get there)."""

    def settle(self) -> None:
        """Wait until no rank reads or writes what ranks hold: a collective where any reads alone."""

    def drop(self) -> None:
        """Give it back; nobody asks for it any more."""


class HeldInArena(Held):
    """Memory that the other ranks of the host read by themselves.

    Args:
        block: this rank's, and the place of the others'.
        rows: as for `Held`; they are copied.
    """

    reads_alone = True
    reads_ahead = False

    def __init__(self, block: Block, rows: Tensor, sharding: Sharding, label: str) -> None:
        super().__init__(block.view(rows.numel(), rows.dtype).view(rows.shape).copy_(rows), sharding, label)
        self._block = block

    @property
    def movable(self) -> list[Tensor]:
        return []

    def start(self, rows: Tensor) -> list[Waitable]:
        chunk = rows.shape[2]
        for index, row in enumerate(rows):
            for rank, part in enumerate(row):
                self.read(rank, index * chunk, part)
        return []

    def read(self, rank: int, start: int, target: Tensor) -> None:
        if rank == self._sharding.hold_group.rank:
            super().read(rank, start, target)
        else:
            self._block.read(rank, start, target)

    def settle(self) -> None:
        self._block.arena.settle(self._label)

    def drop(self) -> None:
        self.settle()  # a slower rank may still be reading
        self._rows, self.mine = self._rows.new_empty(0), None
        self._block.give_back()


class HeldOnHost(Held):
    """The host's memory, page-locked if asked, where the flat is on a device."""

    def __init__(self, rows: Tensor, sharding: Sharding, label: str, *, pin: bool) -> None:
        kept = aligned_empty(rows.numel(), rows.dtype, pin=pin).view(rows.shape)
        super().__init__(kept.copy_(rows), sharding, label)
        self.reads_alone = sharding.hold_group.size == 1
        self.mine = None

    @property
    def movable(self) -> list[Tensor]:
        return []

    def start(self, rows: Tensor) -> list[Waitable]:
        near = self._sharding.hold_group
        rows[0, near.rank].copy_(self._rows[0], non_blocking=True)
        return [] if near.size == 1 else [_gather(rows[0], near, self._label)]

    @contextmanager
    def writing(self, start: int, stop: int, device: torch.device) -> Iterator[Tensor]:
        kept = self._rows[0, start:stop]
        place = kept.to(device)  # with its values: a step that is skipped writes nothing
        yield place
        if place is not kept:
            kept.copy_(place)


class PeerFiles:
    """Swap files of the hold group's ranks, in their order, as this rank reads them.

    Args:
        own: this rank's.
        rank: in the group.

    Attributes:
        files: those that were opened.
    """

    def __init__(self, own: DataFile, rank: int) -> None:
        self._own, self._rank = own, rank
        self.files: list[DataFile] = []

    def open(self, path: str) -> None:
        """Open the next rank's file (OffloadError: it is not there, or not to be read)."""
        self.files.append(self._own if len(self.files) == self._rank else DataFile(path, os.O_RDONLY))

    def __del__(self) -> None:
        for file in self.files:
            if file is not self._own:
                file.close()


class HeldOnDisk(Held):
    """An extent of a swap file.

    Args:
        tier: where; every rank holds in its own what it was asked for in the same order, so that extents of a
            unit are at the same offset in all of them.
        peers: the files of all ranks that hold the unit; None where this rank does not see them.
        chunk: what this rank shall hold (flat).
    """

    reads_ahead = True
    nbytes = 0

    def __init__(
        self, tier: DiskTier, peers: PeerFiles | None, chunk: Tensor, sharding: Sharding, label: str
    ) -> None:
        super().__init__(chunk.new_empty(1, 0), sharding, label)
        self.mine = None
        self._tier, self._peers = tier, peers
        self.reads_alone = peers is not None
        self.nbytes_on_disk = chunk.numel() * chunk.element_size()
        self._extent: Extent | None = None
        with tier.noting_failure():  # raised where all ranks settle
            self._extent = tier.reserve(self.nbytes_on_disk)
            self.write(0, chunk)

    @property
    def movable(self) -> list[Tensor]:
        return []

    def start(self, rows: Tensor) -> list[Waitable]:
        near, row = self._sharding.hold_group, rows[0]
        if self._peers is None:
            return [GatherFromDisk(self._reading(near.rank, 0, row[near.rank]), row, near, self._label)]
        return [self._reading(rank, 0, part) for rank, part in enumerate(row)]

    def read(self, rank: int, start: int, target: Tensor) -> None:
        self._reading(rank, start, target).wait()

    def read_mine(self, start: int, stop: int) -> Tensor:
        values = self._rows.new_empty(stop - start)
        self.read(self._sharding.hold_group.rank, start, values)
        return values

    def _reading(self, rank: int, start: int, target: Tensor) -> Waitable:
        assert self._extent is not None
        file = self._extent.file if self._peers is None else self._peers.files[rank]
        offset = self._extent.offset + start * target.element_size()
        return self._tier.read(file, offset, target)

    def write(self, start: int, values: Tensor) -> None:
        with self._tier.noting_failure(), self._place(start, start + values.numel()) as place:
            place.copy_(values)

    @contextmanager
    def writing(self, start: int, stop: int, device: torch.device) -> Iterator[Tensor]:
        with self._place(start, stop) as place:
            if device.type == "cpu":
                yield place
            else:
                values = torch.empty(place.shape, dtype=place.dtype, device=device)
                yield values
                place.copy_(values)

    @contextmanager
    def _place(self, start: int, stop: int) -> Iterator[Tensor]:
        assert self._extent is not None
        dtype = self._rows.dtype
        size = dtype.itemsize
        with self._tier.written_behind(self._extent, start * size, (stop - start) * size) as buffer:
            yield buffer.view(dtype)

    def spread(self, label: str) -> dist.Work | None:
        return None

    @property
    def failure(self) -> OffloadError | None:
        return self._tier.failure

    def drain(self) -> None:
        with self._tier.noting_failure():
            self._tier.drain()
        if self._tier.failure is not None:
            raise self._tier.failure

    def settle(self) -> None:
        with self._tier.noting_failure():
            self._tier.drain()
        raise_together(self._tier.failure, self._sharding.everyone.process_group)

    def drop(self) -> None:
        self.settle()  # a slower rank may still be reading
        if self._extent is not None:
            self._tier.free(self._extent)
        del self._tier, self._peers, self._extent  # with the last unit on it the tier goes
        self.nbytes_on_disk = 0


class GatherFromDisk:
    """A gather whose own part comes from disk; the others' are asked for when it is waited for."""

    def __init__(self, own: Waitable, row: Tensor, near: RankGroup, label: str) -> None:
        self._own, self._row, self._near, self._label = own, row, near, label

    def wait(self) -> None:
        """Return when all parts are there; the collective takes place even if this rank's part is not."""
        try:
            self._own.wait()
        finally:
            _gather(self._row, self._near, self._label).wait()


def _gather(row: Tensor, near: RankGroup, label: str) -> Waitable:
    """Begin to fill a row (hold ranks, chunk) of which this rank's chunk is in its place."""
    work: dist.Work = comm.start_all_gather(
        row.view(-1), row[near.rank], group=near.process_group, label=label
    )
    return work


def wait_for_all(work: Sequence[Waitable]) -> None:
    """Wait for everything; then raise the first OffloadError there was."""
    failure = None
    for one in work:
        try:
            one.wait()
        except OffloadError as error:
            failure = failure or error
    if failure is not None:
        raise failure
