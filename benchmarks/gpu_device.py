"""The device that rows of gpu.py run on, a GPU or the host in its place: its name, its memory, how fast it computes."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

# Dense bf16 operations a second, as the maker states them; the first whose words are within the device's name.
PEAKS = (
    ("B200", 2250e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
)
HOST = "cpu"


def kind() -> str:
    """Return torch's name for the kind of device: cuda, xpu, ...; cpu where there is none."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return HOST if found is None else found.type


def name() -> str:
    """Return the device's own name."""
    module = torch.get_device_module(kind())
    return str(module.get_device_name()) if hasattr(module, "get_device_name") else kind()


def peak_flops(device: str) -> float | None:
    """Return the dense bf16 operations a second of a device by its name; None for one that is not in the table."""
    return next((peak for words, peak in PEAKS if words in device), None)


def backend() -> str:
    """Return the name of what sends tensors of this device."""
    return str(torch.distributed.get_default_backend_for_device(kind()))


def synchronize() -> None:
    """Wait until the device has done all it was given."""
    if kind() != HOST:
        torch.accelerator.synchronize()


def restart_peak() -> None:
    """Forget the peak of the device's memory so far."""
    if kind() != HOST:
        torch.accelerator.reset_peak_memory_stats()


def peak_memory() -> int | None:
    """Bytes of tensors at the peak since `restart_peak`; None on the host."""
    return None if kind() == HOST else int(torch.accelerator.max_memory_allocated())


def seconds_of(work: Callable[[], object], times: int) -> float:
    """Seconds of one call of `work`, from its start to when the device has done it, over `times` calls in a row."""
    synchronize()
    began = time.perf_counter()
    for _ in range(times):
        work()
    synchronize()
    return (time.perf_counter() - began) / times


def copy_bandwidth() -> float:
    """Measure the bytes a second that a copy within the device's memory reads and writes."""
    size = 2**30 if kind() != HOST else 2**26
    source = torch.zeros(size, dtype=torch.uint8, device=kind())
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * size / min(seconds_of(lambda: target.copy_(source), 10) for _ in range(3))
