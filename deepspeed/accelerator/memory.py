"""How much device memory is used; on the CPU, how much the process occupies."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import psutil
import torch

from deepspeed.accelerator.devices import Devices
from deepspeed.accelerator.heap import trim_heap


def resident_bytes() -> int:
    """Return the memory this process occupies, in bytes."""
    return int(psutil.Process().memory_info().rss)


def peak_resident_bytes() -> int:
    """Return the most memory this process has occupied, in bytes (what it occupies now on Windows)."""
    try:
        import resource
    except ImportError:
        return resident_bytes()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024


class Memory(Devices):
    """Memory figures in bytes. On the CPU they are the process's resident memory, which has no reset."""

    def memory_allocated(self, device_index: int | None = None) -> int:
        """Return the bytes in use by tensors (CPU: resident memory of the process)."""
        return int(self._figure("memory_allocated", device_index, resident_bytes))

    def max_memory_allocated(self, device_index: int | None = None) -> int:
        """Return the peak of `memory_allocated`."""
        return int(self._figure("max_memory_allocated", device_index, peak_resident_bytes))

    def memory_reserved(self, device_index: int | None = None) -> int:
        """Return the bytes that torch's allocator holds."""
        return int(self._figure("memory_reserved", device_index, resident_bytes))

    def max_memory_reserved(self, device_index: int | None = None) -> int:
        """Return the peak of `memory_reserved`."""
        return int(self._figure("max_memory_reserved", device_index, peak_resident_bytes))

    def memory_cached(self, device_index: int | None = None) -> int:
        """Return `memory_reserved`, under torch's old name."""
        return self.memory_reserved(device_index)

    def max_memory_cached(self, device_index: int | None = None) -> int:
        """Return `max_memory_reserved`, under torch's old name."""
        return self.max_memory_reserved(device_index)

    def memory_stats(self, device_index: int | None = None) -> dict[str, Any]:
        """Return the allocator's own figures by name (CPU: none)."""
        return dict(self._figure("memory_stats", device_index, dict))

    def reset_peak_memory_stats(self, device_index: int | None = None) -> None:
        """Start the peaks anew, where the device can."""
        self._figure("reset_peak_memory_stats", device_index, lambda: None)

    def reset_max_memory_allocated(self, device_index: int | None = None) -> None:
        """Start the peaks anew, under torch's old name."""
        self.reset_peak_memory_stats(device_index)

    def reset_max_memory_cached(self, device_index: int | None = None) -> None:
        """Start the peaks anew, under torch's old name."""
        self.reset_peak_memory_stats(device_index)

    def total_memory(self, device_index: int | None = None) -> int:
        """Return the device's memory (CPU: the machine's)."""
        if hasattr(self.module, "get_device_properties"):
            return int(self.module.get_device_properties(device_index).total_memory)
        return int(psutil.virtual_memory().total)

    def available_memory(self, device_index: int | None = None) -> int:
        """Return the bytes that are free now."""
        if hasattr(self.module, "mem_get_info"):
            return int(self.module.mem_get_info(device_index)[0])
        return int(psutil.virtual_memory().available)

    def empty_cache(self) -> None:
        """Give memory that the allocator holds unused back to the device (CPU: to the system)."""
        if self.on_host:
            trim_heap()
        elif hasattr(self.module, "empty_cache"):
            self.module.empty_cache()

    def pin_memory(self, tensor: torch.Tensor, align_bytes: int = 1) -> torch.Tensor:
        """Return `tensor` in page-locked memory; on the CPU there is no one to copy to, so as it is."""
        return tensor if self.on_host else tensor.pin_memory()

    def send(
        self, numbers: Sequence[float], device: torch.device, *, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """Return numbers as a tensor (1-dim) on `device`; the host does not wait until they are there.

        ``torch.tensor(numbers, device=...)`` copies from pageable memory, and so waits for all that the device has
        been given before.
        """
        on_host = torch.tensor(numbers, dtype=dtype, device="cpu")
        return on_host if device.type == "cpu" else self.pin_memory(on_host).to(device, non_blocking=True)

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        """Tell whether `tensor` is page-locked (always true on the CPU, where it makes no difference)."""
        return True if self.on_host else tensor.is_pinned()

    def _figure(self, name: str, device_index: int | None, otherwise: Callable[[], Any]) -> Any:
        function = None if self.on_host else getattr(self.module, name, None)
        return otherwise() if function is None else function(device_index)
