"""What has been reduced of a unit's gradient since the last step: this rank's chunk, summed over ranks.

Note [First landing keeps its dtype]
The first reduction of a step lands in the shard as it came (bf16, say); only a second one makes the shard
wide (`accumulate`, fp32) and adds. Widening is exact, so the result is that of accumulating in fp32 from the
start, and without accumulation the optimizer reads half the bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from deepspeed.accelerator import get_accelerator
from deepspeed.offload.tier import DiskTier, Parcel
from deepspeed.zero.buffers import PinnedPool

NORM_PART = 65_536
"""Elements of a shard whose norm is taken at a time on the host."""


ADD_PART = 262_144
"""Elements that are added to a sum at a time on the host."""


class LandedGradient(Protocol):
    """A chunk of a gradient, wherever it is kept."""

    @property
    def is_empty(self) -> bool:
        """Whether nothing has landed since the last step."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""

    def add(self, landing: Tensor) -> None:
        """Take over a reduced gradient and add it to what landed before."""

    def norms(self, share: int = 0, shares: int = 1) -> list[Tensor]:
        """Return norms (0-dim, fp32) of parts of the chunk; all shares together are the whole of it."""

    def visit(self, start: int, stop: int, *, changed: bool = False) -> Iterator[tuple[int, Tensor]]:
        """Yield a range of the chunk in parts that are in memory: where each begins, and its values.

        Args:
            start: first element.
            stop: first element behind the range.
            changed: whether the caller writes to the values.
        """

    def prefetch(self, start: int) -> None:
        """Begin to bring in the part around `start`."""

    def clear(self) -> None:
        """Forget it."""


class GradientInMemory:
    """A landed gradient in memory; `shard` is None while nothing has landed."""

    def __init__(self, accumulate: torch.dtype) -> None:
        self._accumulate = accumulate
        self.shard: Tensor | None = None

    @property
    def is_empty(self) -> bool:
        return self.shard is None

    @property
    def nbytes(self) -> int:
        return 0 if self.shard is None else self.shard.numel() * self.shard.element_size()

    def add(self, landing: Tensor) -> None:
        if self.shard is None:
            self.shard = landing
            return
        if self.shard.dtype != self._accumulate:
            self.shard = self._widened(self.shard)
        add_to(self.shard, landing)

    def _widened(self, narrow: Tensor) -> Tensor:
        return narrow.to(self._accumulate)

    def norms(self, share: int = 0, shares: int = 1) -> list[Tensor]:
        return [] if self.shard is None else norms_of(self.shard.tensor_split(shares)[share])

    def visit(self, start: int, stop: int, *, changed: bool = False) -> Iterator[tuple[int, Tensor]]:
        if self.shard is not None:
            yield start, self.shard[start:stop]

    def prefetch(self, start: int) -> None:
        pass

    def clear(self) -> None:
        self.shard = None


class GradientOnHost(GradientInMemory):
    """A landed gradient in host memory, for an update that runs there.

    Note [Gradients leave while backward runs]
        The copy goes over a stream of its own, which waits for the reduction; the memory on the device is given
        up once the copy has been waited for, at the next landing or at the step.
    """

    def __init__(self, accumulate: torch.dtype, stream: Any) -> None:
        super().__init__(accumulate)
        self._pool = PinnedPool()
        self._stream = stream
        self._leaving: Tensor | None = None

    def add(self, landing: Tensor) -> None:
        accelerator = get_accelerator()
        self._arrive()
        host = self._pool.take(landing.numel(), landing.dtype)
        if self._stream is not None:
            self._stream.wait_stream(accelerator.current_stream())
        with nullcontext() if self._stream is None else accelerator.stream(self._stream):
            host.copy_(landing, non_blocking=True)
        self._leaving = landing
        if self.shard is not None:
            self._arrive()
        super().add(host)
        if self.shard is not host:
            self._pool.give(host)

    def _widened(self, narrow: Tensor) -> Tensor:
        wide = self._pool.take(narrow.numel(), self._accumulate).copy_(narrow)
        self._pool.give(narrow)
        return wide

    def _arrive(self) -> None:
        """Wait for the copy under way."""
        if self._leaving is not None and self._stream is not None:
            self._stream.synchronize()
        self._leaving = None

    def norms(self, share: int = 0, shares: int = 1) -> list[Tensor]:
        self._arrive()
        return super().norms(share, shares)

    def visit(self, start: int, stop: int, *, changed: bool = False) -> Iterator[tuple[int, Tensor]]:
        self._arrive()
        return super().visit(start, stop, changed=changed)

    def clear(self) -> None:
        self._arrive()
        if self.shard is not None:
            self._pool.give(self.shard)
        super().clear()


class GradientOnDisk:
    """A landed gradient on disk, in tiles.

    Args:
        tier: where it goes.
        accumulate: dtype of sums.
        tile: elements that are in memory at a time.
    """

    def __init__(self, tier: DiskTier, accumulate: torch.dtype, tile: int) -> None:
        self._tier, self._accumulate, self._tile = tier, accumulate, tile
        self._tiles: list[Parcel] = []
        self._norms: list[list[Tensor]] = []  # by tile
        self.is_empty = True

    nbytes = 0

    def add(self, landing: Tensor) -> None:
        with self._tier.noting_failure():
            self._add(landing)
        self.is_empty = False

    def _add(self, landing: Tensor) -> None:
        parts = landing.cpu().split(self._tile)
        while len(self._tiles) < len(parts):
            self._tiles.append(Parcel())
        if self.is_empty:
            self._norms = [norms_of(part) for part in parts]
            for tile, part in zip(self._tiles, parts, strict=True):
                self._tier.put(tile, [part.detach()])
        else:
            for index, part in enumerate(parts):
                self._add_part(index, part)

    def _add_part(self, index: int, part: Tensor) -> None:
        tile = self._tiles[index]
        self._tier.fetch(tile)
        if index + 1 < len(self._tiles):
            self._tier.prefetch(self._tiles[index + 1])
        total = tile.tensors[0].to(self._accumulate).add_(part)
        self._norms[index] = norms_of(total)
        self._tier.put(tile, [total])

    def norms(self, share: int = 0, shares: int = 1) -> list[Tensor]:
        return [norm for norms in self._norms for norm in norms][share::shares]

    def visit(self, start: int, stop: int, *, changed: bool = False) -> Iterator[tuple[int, Tensor]]:
        if self.is_empty:
            return
        while start < stop:
            index = start // self._tile
            first, end = index * self._tile, min(stop, (index + 1) * self._tile)
            tile = self._tiles[index]
            with self._tier.holding(tile, changed=changed):
                yield start, tile.tensors[0][start - first : end - first]
                if changed:
                    self._norms[index] = norms_of(tile.tensors[0])
            start = end

    def prefetch(self, start: int) -> None:
        self._tier.prefetch(self._tiles[start // self._tile])

    def clear(self) -> None:
        self._norms, self.is_empty = [], True


@torch.no_grad()
def add_to(total: Tensor, more: Tensor) -> None:
    """Add a tensor (flat) to a wider one in place.

    On the host in parts that fit the cache: there torch widens a whole 16-bit tensor in memory before it adds it.
    """
    if total.device.type != "cpu" or total.dtype == more.dtype:
        total.add_(more)
    else:
        torch._foreach_add_(total.split(ADD_PART), more.split(ADD_PART))


def norms_of(shard: Tensor) -> list[Tensor]:
    """Return norms of the parts of a shard, in fp32, summed in fp32 or wider.

    The parts of one on the host fit the cache: there torch widens a whole 16-bit tensor in memory before it
    takes the norm, and adds up a long one less exactly.
    """
    parts = shard.split(NORM_PART) if shard.device.type == "cpu" else [shard]
    wide = torch.promote_types(shard.dtype, torch.float32)
    return [torch.linalg.vector_norm(part, dtype=wide).float() for part in parts]
