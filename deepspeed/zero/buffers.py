"""Buffers that are used again.

Note [Buffers on the host]
Fresh host memory costs a page fault every 4 KiB, more than the copy into it, so on the host buffers are kept
and handed out again. A device has a caching allocator that does this, and memory kept there would be missing
from the forward pass, so there they are simply dropped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepspeed.offload.buffers import pinned_empty


class BufferPool:
    """Hand out flat buffers with stale contents; the one who takes a buffer owns it until it is given back.

    Args:
        device: where they are.
        pin: whether they are page-locked, on the host.
    """

    def __init__(self, device: torch.device, *, pin: bool = False) -> None:
        self._device = device
        self._pin = pin
        self._keep = device.type == "cpu"
        self._free: list[Tensor] = []

    def take(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Return a buffer of exactly `numel` elements, cut from a kept one of at most twice that, or new."""
        fitting = [
            buffer for buffer in self._free if buffer.dtype == dtype and numel <= buffer.numel() <= 2 * numel
        ]
        if not fitting:
            if self._pin:
                return pinned_empty(numel, dtype)
            return torch.empty(numel, dtype=dtype, device=self._device)
        best = min(fitting, key=Tensor.numel)
        self._free = [buffer for buffer in self._free if buffer is not best]
        return best[:numel]

    def give(self, buffer: Tensor) -> None:
        """Take back a buffer that came from `take` and that nobody reads or writes any more."""
        if self._keep:
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
