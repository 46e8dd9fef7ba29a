"""Host memory that a disk can read and write without a copy in between.

|<---------------- storage: a multiple of 4096 bytes ---------------->|
|<------------ the tensor: numel elements ------------>|<--- unused ->|
^ at a multiple of 4096
"""

from __future__ import annotations

import contextlib
import mmap
import weakref

import numpy as np
import torch
from torch import Tensor

from deepspeed.accelerator import get_accelerator
from deepspeed.errors import OffloadError

ALIGNMENT = 4096
"""Bytes: where direct I/O wants memory, file offsets and lengths to start and end on every usual disk."""


def aligned_size(nbytes: int) -> int:
    """Round `nbytes` up to a multiple of `ALIGNMENT`."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def pinned_empty(numel: int, dtype: torch.dtype) -> Tensor:
    """Return a 1-D host tensor that a device can read and write by itself; any memory where there is none."""
    return torch.empty(numel, dtype=dtype, pin_memory=not get_accelerator().on_host)


def aligned_empty(numel: int, dtype: torch.dtype, pin: bool = False) -> Tensor:
    """Return a 1-D host tensor of zeros that starts at a multiple of 4096 bytes.

    Its storage is padded to a multiple of 4096 bytes and goes back to the system when the last view of it
    does. With `pin` it is page-locked for the device (on the CPU there is none, and nothing to lock).
    """
    nbytes = aligned_size(max(numel * dtype.itemsize, 1))
    accelerator = get_accelerator()
    if not pin or accelerator.on_host:
        whole = torch.from_numpy(_mapped(nbytes))
    elif accelerator.kind == "cuda":
        whole = torch.from_numpy(_registered(nbytes))
    else:
        whole = _pinned_with_slack(nbytes)
    return whole[: numel * dtype.itemsize].view(dtype)


def _mapped(nbytes: int) -> np.ndarray:
    """Map memory of its own: not from the heap, so that freeing it always gives it back."""
    mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(
        mmap, "MADV_HUGEPAGE"
    ):  # direct I/O locks page by page: with large ones it is about a tenth faster
        with contextlib.suppress(OSError):  # a kernel without them
            mapping.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(mapping, dtype=np.uint8)


def _registered(nbytes: int) -> np.ndarray:
    """Map memory and lock it for CUDA; torch's own pinned memory would round up to a power of two."""
    array = _mapped(nbytes)
    runtime, address = torch.cuda.cudart(), array.ctypes.data
    if code := int(runtime.cudaHostRegister(address, nbytes, 0)):
        raise OffloadError(
            f"pin_memory: cannot lock {nbytes} bytes of host memory for the device (CUDA error {code}); "
            "raise the limit (ulimit -l), free memory, or set pin_memory to false"
        )
    weakref.finalize(array, runtime.cudaHostUnregister, address)
    return array


def _pinned_with_slack(nbytes: int) -> Tensor:
    """Take pinned memory from torch, and the aligned part of it."""
    whole = torch.empty(nbytes + ALIGNMENT, dtype=torch.uint8, pin_memory=True)
    start = -whole.data_ptr() % ALIGNMENT
    return whole[start : start + nbytes].zero_()
