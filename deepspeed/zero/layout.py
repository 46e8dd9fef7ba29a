"""Which range of which parameter lives on which rank: pure arithmetic, no tensors.

    flat     [ p0 ........ | p1 .. gap | p2 ................ | gap ]     offsets are multiples of ALIGN
    shards   [   rank 0    |   rank 1    |   rank 2    |   rank 3  ]     every shard has `chunk` elements

An *even* layout cuts the flat anywhere; a *whole* layout keeps every parameter inside one shard, for
optimizers that need whole matrices (Muon) or per-parameter norms (LAMB).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

ALIGN = 32
"""Elements. Parameters start, and shards end, on 64 bytes (bf16) or 128 (fp32), as vector units like it."""


@dataclass(frozen=True)
class Piece:
    """The range of one parameter that falls in one shard."""

    index: int  # of the parameter in its unit
    param_start: int  # elements, in the flattened parameter
    shard_start: int  # elements, in the shard
    numel: int

    @property
    def shard_stop(self) -> int:
        return self.shard_start + self.numel

    @property
    def param_stop(self) -> int:
        return self.param_start + self.numel


@dataclass(frozen=True)
class Layout:
    """Offsets of `numels` in a flat of `ranks` shards of `chunk` elements each."""

    numels: tuple[int, ...]
    offsets: tuple[int, ...]
    chunk: int
    ranks: int

    @property
    def total(self) -> int:
        """Elements of the flat, gaps included."""
        return self.chunk * self.ranks

    def pieces(self, rank: int) -> list[Piece]:
        """Pieces in the shard of `rank`, in the order they lie there."""
        low, high = rank * self.chunk, (rank + 1) * self.chunk
        found = []
        for index, (offset, numel) in enumerate(zip(self.offsets, self.numels, strict=True)):
            start, stop = max(offset, low), min(offset + numel, high)
            if start < stop:
                found.append(Piece(index, start - offset, start - low, stop - start))
        return sorted(found, key=lambda piece: piece.shard_start)

    @cached_property
    def gaps(self) -> tuple[tuple[int, int], ...]:
        """Ranges (start, stop) of the flat that belong to no parameter."""
        taken = sorted(
            (offset, offset + numel) for offset, numel in zip(self.offsets, self.numels, strict=True)
        )
        gaps, position = [], 0
        for start, stop in taken:
            if start > position:
                gaps.append((position, start))
            position = max(position, stop)
        if position < self.total:
            gaps.append((position, self.total))
        return tuple(gaps)

    @cached_property
    def sequence(self) -> tuple[tuple[int, int], ...]:
        """What lies in the flat, one after the other: (index of a parameter, or -1 for a gap; its elements)."""
        taken = [
            (start, index, numel)
            for index, (start, numel) in enumerate(zip(self.offsets, self.numels, strict=True))
        ]
        free = [(start, -1, stop - start) for start, stop in self.gaps]
        return tuple((index, numel) for _, index, numel in sorted([*taken, *free]) if numel > 0)


def even_layout(numels: Sequence[int], ranks: int) -> Layout:
    """Lay parameters one after the other and cut the flat into equal shards, wherever the cuts fall."""
    offsets, position = [], 0
    for numel in numels:
        offsets.append(position)
        position += _aligned(numel)
    chunk = max(_aligned(-(-position // ranks)), ALIGN)
    return Layout(tuple(numels), tuple(offsets), chunk, ranks)


def whole_layout(numels: Sequence[int], ranks: int) -> Layout:
    """Give every parameter to one rank, the largest first to the rank with the least so far."""
    loads = [(0, rank) for rank in range(ranks)]
    places = {}
    for index in sorted(range(len(numels)), key=lambda i: (-numels[i], i)):
        load, rank = heapq.heappop(loads)
        places[index] = (rank, load)
        heapq.heappush(loads, (load + _aligned(numels[index]), rank))
    chunk = max(max(load for load, _ in loads), ALIGN)
    offsets = tuple(places[index][0] * chunk + places[index][1] for index in range(len(numels)))
    return Layout(tuple(numels), offsets, chunk, ranks)


def _aligned(numel: int) -> int:
    return -(-numel // ALIGN) * ALIGN
