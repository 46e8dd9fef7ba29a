"""Blocks of memory that one rank writes and the others of its host read: see note [Rooms and signals]."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import weakref
from functools import cache
from typing import Any

import torch
from torch import Tensor

from deepspeed.errors import CommunicationError

SWITCH = "DEEPSPEED_SHARED_MEMORY"
"""Environment variable; ``0`` (or ``off``, ``no``, ``false``) on any rank leaves all traffic on the CPU to gloo."""

PAGE = mmap.PAGESIZE
SEGMENT = 2**28
"""Bytes of an arena that are mapped at a time; what nobody has written to takes no memory."""

WAY_OUT = {
    errno.EMFILE: "allow it more open files (ulimit -n)",
    errno.ETOOMANYREFS: "allow it more open files (ulimit -n)",
    errno.EFBIG: "allow it larger files (ulimit -f)",
    errno.ENOMEM: "allow it more memory (ulimit -v), or give it more",
}


def failure(what: str, error: OSError) -> CommunicationError:
    """Put an error of the system into a sentence: what a process could not do, why, the way out."""
    way_out = WAY_OUT.get(error.errno or 0, "give it more memory")
    return CommunicationError(
        f"{what}: {error.strerror or error}; {way_out}, or set {SWITCH}=0 to leave all to gloo"
    )


class Room:
    """A block of memory that one rank writes and the others read."""

    def __init__(self, fd: int, nbytes: int, index: int) -> None:
        self.nbytes, self.index = nbytes, index
        self._mapping = _mapped(fd, nbytes)
        with torch.inference_mode(False):  # it outlives the call in which it is made
            self._bytes = torch.frombuffer(self._mapping, dtype=torch.uint8)
        self.readers: set[int] = set()

    def view(self, numel: int, dtype: torch.dtype) -> Tensor:
        """View the first `numel` elements."""
        return self._bytes[: numel * dtype.itemsize].view(dtype)

    def leave(self) -> None:
        """Count a peer's room no longer as memory of this rank's; it is mapped again when it is read again."""
        _libc().madvise(self._mapping, ctypes.c_size_t(self.nbytes), mmap.MADV_DONTNEED)


def new_memory(name: str, nbytes: int) -> int:
    """Make anonymous memory that others can map; return its file descriptor."""
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC)
    try:
        os.ftruncate(descriptor, nbytes)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def new_room(nbytes: int, index: int) -> tuple[Room, int]:
    """Make a room of this many bytes or more; return the file descriptor that others map it by, too."""
    size = max(PAGE, 1 << (nbytes - 1).bit_length())
    descriptor = new_memory("deepspeed", size)
    try:
        return Room(descriptor, size, index), descriptor
    except OSError:
        os.close(descriptor)
        raise


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return libc


def _mapped(descriptor: int, nbytes: int) -> Any:
    """Map shared memory as an array of bytes, until nobody holds it; Python's mmap would keep a descriptor open."""
    address = _libc().mmap(None, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, descriptor, 0)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    mapping = (ctypes.c_char * nbytes).from_address(address)
    weakref.finalize(mapping, _libc().munmap, address, nbytes).atexit = False
    return mapping
