"""Buffers that are used again."""

from __future__ import annotations

import torch
from torch import Tensor

from deepspeed.offload.buffers import pinned_empty


class PinnedPool:
    """Hand out flat buffers in page-locked host memory, with stale contents; who takes one gives it back.

    Locking pages is slow, so they are kept. Other memory needs no pool: an allocator keeps it (a device's own; on
    the host see note [Freed memory is kept]), and what lay in a pool would be missing from the forward pass.
    """

    def __init__(self) -> None:
        self._free: list[Tensor] = []

    def take(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Return a buffer of exactly `numel` elements, cut from a kept one of at most twice that, or new."""
        fitting = [
            buffer for buffer in self._free if buffer.dtype == dtype and numel <= buffer.numel() <= 2 * numel
        ]
        if not fitting:
            return pinned_empty(numel, dtype)
        best = min(fitting, key=Tensor.numel)
        self._free = [buffer for buffer in self._free if buffer is not best]
        return best[:numel]

    def give(self, buffer: Tensor) -> None:
        """Take back a buffer that came from `take` and that nobody reads or writes any more."""
        self._free.append(buffer if buffer._base is None else buffer._base)


class Scratch:
    """One piece of memory that whoever takes it owns until it is taken again.

    Args:
        nbytes: how much there is; what is larger is new. Memory that nobody has written to costs nothing.
        device: where it is.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self._device = device
        self._bytes = torch.empty(nbytes, dtype=torch.uint8, device=device)

    def take(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Return a flat tensor with stale contents."""
        wanted = numel * dtype.itemsize
        if wanted > self._bytes.numel():
            return torch.empty(numel, dtype=dtype, device=self._device)
        return self._bytes[:wanted].view(dtype)
