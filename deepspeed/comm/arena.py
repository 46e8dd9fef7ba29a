"""Memory of a rank that the other ranks of its host can read at any time, without its help.

Note [Reading without asking]
    A collective needs every rank; a rank whose graph takes another branch would leave the others waiting. An
    arena is anonymous memory (memfd) whose descriptor every peer has, so a rank that wants a shard reads it
    from the descriptor straight to where it is needed: one copy, no signal, no mapping that would count as
    this rank's memory. Who changes what lies in an arena calls `settle` before anybody reads it again.

    An arena lives until the last rank has dropped it, so a rank that is done early takes nothing away from
    the others. Blocks are made in the same order and sizes on every rank: the offset is the address.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from typing import Any

import torch
from torch import Tensor

from deepspeed.comm.collectives import all_reduce
from deepspeed.comm.links import Links
from deepspeed.comm.neighbours import links_of
from deepspeed.comm.rooms import PAGE, SEGMENT, failure, new_memory
from deepspeed.errors import CommunicationError


class Arena:
    """This rank's memory for others to read, and the descriptors of theirs."""

    def __init__(self, links: Links, group: Any) -> None:
        self._group = group
        self._segment: mmap.mmap | None = None  # a mapping keeps a descriptor open, so blocks share one
        self._start = self._used = self._end = 0
        try:
            self._descriptor = new_memory("deepspeed-arena", 0)
        except OSError as error:
            raise failure("cannot make memory for others to read", error) from error
        self._theirs = links.share(self._descriptor, b"arena")
        weakref.finalize(self, _close, [self._descriptor, *self._theirs.values()])

    def block(self, nbytes: int) -> Block:
        """Return new zeroed memory; every rank asks for as much."""
        size = max(1, -(-nbytes // PAGE)) * PAGE
        if self._segment is None or self._used + size > len(self._segment):
            self._start, self._used = self._end, 0
            self._end += max(size, SEGMENT)
            self._segment = self._mapped()
        block = Block(self, self._segment, self._used, self._start + self._used, size)
        self._used += size
        return block

    def _mapped(self) -> mmap.mmap:
        """Lengthen the memory, and map what is new."""
        length = self._end - self._start
        try:
            os.ftruncate(self._descriptor, self._end)
            return mmap.mmap(self._descriptor, length, offset=self._start)
        except OSError as error:
            raise failure(f"cannot map {length} bytes for others to read", error) from error

    def read(self, rank: int, offset: int, target: Tensor) -> None:
        """Fill `target` (contiguous) from the memory of `rank` in the group."""
        wanted = target.numel() * target.element_size()
        memory = memoryview((ctypes.c_char * wanted).from_address(target.data_ptr()))
        done = 0
        while done < wanted:
            count = os.preadv(self._theirs[rank], [memory[done:]], offset + done)
            if count == 0:
                raise CommunicationError(f"rank {rank} of the group has less memory than expected")
            done += count

    def settle(self, label: str = "") -> None:
        """Wait until every rank has written what it had to write: a collective."""
        all_reduce(torch.zeros(1), group=self._group, label=label)


class Block:
    """A range of an arena; the same range on every rank holds that rank's part."""

    def __init__(self, arena: Arena, segment: mmap.mmap, within: int, address: int, size: int) -> None:
        self.arena = arena
        self._segment: mmap.mmap | None = segment
        self._within, self._address, self._size = within, address, size

    def view(self, numel: int, dtype: torch.dtype) -> Tensor:
        """View this rank's range from its start."""
        return torch.frombuffer(self._segment, dtype=dtype, count=numel, offset=self._within)

    def read(self, rank: int, start: int, target: Tensor) -> None:
        """Fill `target` from the range of `rank`, `start` elements of its dtype into it."""
        self.arena.read(rank, self._address + start * target.element_size(), target)

    def give_back(self) -> None:
        """Return this rank's memory to the system; nobody may read or view the block any more."""
        if self._segment is not None:
            self._segment.madvise(mmap.MADV_REMOVE, self._within, self._size)
            self._segment = None


def arena_of(group: Any) -> Arena | None:
    """Make an arena over the ranks of `group`, all together; None where they share no memory."""
    links = links_of(group)
    return None if links is None else Arena(links, group)


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
