"""The C library's heap: what it keeps, and what it gives back to the system.

Note [Freed memory is kept]
    glibc gives large blocks back to the system when they are freed, so every training step would get the pages of
    its activations, gradients and gathered weights anew: a fault for each 4 KiB, in all a tenth of the step and
    more. `keep_freed_memory` has all but the largest blocks come from the heap, whose end is given back only beyond
    2 GiB of free memory. The largest stay apart: an aligned block does not fit where one of its size was freed, so
    the heap has a free place too many for each size, and for those it would count. Settings of the user's
    (MALLOC_..., or glibc.malloc in GLIBC_TUNABLES) are left alone, and so are other C libraries.

Source: mallopt(3), malloc_trim(3).
"""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # parameters of mallopt
_LARGEST = 2**26  # bytes of a block in the heap


def trim_heap() -> None:
    """Give free memory inside the heap back to the system, where the C library can (glibc).

    A large block that is freed below a small one that stays would count as this process's memory otherwise.
    """
    trim = _of_glibc("malloc_trim")
    if trim is not None:
        trim(0)


def keep_freed_memory() -> None:
    """Have the heap keep what is freed for the next allocation. See note [Freed memory is kept]."""
    chosen = any(name.startswith("MALLOC_") for name in os.environ)
    mallopt = _of_glibc("mallopt")
    if mallopt is None or chosen or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    if not mallopt(_MMAP_THRESHOLD, _LARGEST):
        mallopt(_MMAP_THRESHOLD, 2**25)  # the most that glibc before 2.35 takes
    mallopt(_TRIM_THRESHOLD, 2**31 - 1)


def _of_glibc(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
