"""A line about memory in use, for scripts that ask for one; work without Python's collector."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from deepspeed.accelerator import get_accelerator
from deepspeed.common.logging import announce

GIB = 2**30


def see_memory_usage(message: str, force: bool = False) -> None:
    """With `force`, print device and host memory in GiB after `message`, on rank 0."""
    if not force:
        return
    device, host = get_accelerator(), psutil.virtual_memory()
    announce(
        f"{message} | {device.device_name()}: {device.memory_allocated() / GIB:.2f} GiB, "
        f"peak {device.max_memory_allocated() / GIB:.2f} | reserved {device.memory_reserved() / GIB:.2f}, "
        f"peak {device.max_memory_reserved() / GIB:.2f} | host {host.used / GIB:.2f} GiB, {host.percent}%"
    )


@contextmanager
def collector_paused() -> Iterator[None]:
    """Let Python look for cycles later: among the objects of a large process that takes a tenth of a second."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
