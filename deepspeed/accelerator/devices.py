"""Which devices there are, what they are called and what they can compute."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

VISIBLE_DEVICES = {
    "cuda": "CUDA_VISIBLE_DEVICES",
    "xpu": "ZE_AFFINITY_MASK",
    "npu": "ASCEND_RT_VISIBLE_DEVICES",
}


class Devices:
    """The devices of one kind on this machine."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.module: Any = torch.get_device_module(kind)
        self._name = kind
        self._communication_backend_name = dist.get_default_backend_for_device(kind)
        self._compile_backend = "inductor"

    @property
    def on_host(self) -> bool:
        """Whether the device is the CPU itself."""
        return self.kind == "cpu"

    def is_available(self) -> bool:
        """Tell whether there is such a device."""
        return bool(self.module.is_available())

    def device_name(self, device_index: int | None = None) -> str:
        """Return a device string: ``cuda``, or ``cuda:1`` for an index; the CPU has no index."""
        return self.kind if device_index is None or self.on_host else f"{self.kind}:{device_index}"

    def device(self, device_index: int | None = None) -> Any:
        """Return a context that makes the device current inside it."""
        if self.on_host or device_index is None or not hasattr(self.module, "device"):
            return contextlib.nullcontext()
        return self.module.device(device_index)

    def device_count(self) -> int:
        """Return how many devices there are (on the CPU: the launcher's ranks here, at least 1)."""
        if self.on_host:
            return int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
        return int(self.module.device_count())

    def set_device(self, device_index: int) -> None:
        """Make a device current; does nothing where there is only one."""
        if not self.on_host and hasattr(self.module, "set_device"):
            self.module.set_device(device_index)

    def current_device(self) -> int:
        """Return the current device's index (on the CPU: LOCAL_RANK, else 0)."""
        if self.on_host:
            return int(os.environ.get("LOCAL_RANK") or 0)
        return int(self.module.current_device()) if hasattr(self.module, "current_device") else 0

    def current_device_name(self) -> str:
        """Return the current device as torch names it: ``cpu`` or ``cuda:0``."""
        return self.device_name(self.current_device())

    def synchronize(self, device_index: int | None = None) -> None:
        """Wait until the device has done all it was given."""
        if self.on_host:
            return
        if device_index is None:
            self.module.synchronize()
        else:
            self.module.synchronize(device_index)

    def is_synchronized_device(self) -> bool:
        """Tell whether operations are done when their call returns."""
        return self.on_host

    use_host_timers = is_synchronized_device
    resolves_data_dependency = is_synchronized_device
    handles_memory_backpressure = is_synchronized_device

    def communication_backend_name(self) -> str:
        """Return the name of torch.distributed's backend for this device: gloo, nccl, xccl, ..."""
        return self._communication_backend_name

    def communication_backend_version(self) -> Any:
        """Return NCCL's version as a tuple, or None for a backend without one."""
        return self.module.nccl.version() if self._communication_backend_name == "nccl" else None

    def is_bf16_supported(self) -> bool:
        """Tell whether bf16 arithmetic works (in software on a CPU without it)."""
        check = getattr(self.module, "is_bf16_supported", None)
        return True if check is None else bool(check())

    def is_fp16_supported(self) -> bool:
        """Tell whether fp16 arithmetic works."""
        return True

    def supported_dtypes(self) -> list[torch.dtype]:
        """Return the floating dtypes a model may be trained in."""
        return [torch.float32, torch.float16] + ([torch.bfloat16] if self.is_bf16_supported() else [])

    def is_triton_supported(self) -> bool:
        """Tell whether torch.compile makes Triton kernels for this device."""
        return self.kind == "xpu" or (self.kind == "cuda" and self.module.get_device_capability() >= (7, 0))

    def amp(self) -> Any:
        """Return torch's autocast module of the device, or None."""
        return getattr(self.module, "amp", None)

    def on_accelerator(self, tensor: torch.Tensor) -> bool:
        """Tell whether `tensor` lives on a device of this kind."""
        return tensor.device.type == self.kind

    def lazy_call(self, callback: Callable[[], None]) -> None:
        """Run `callback` when the device is ready: now, or once its library is loaded."""
        deferred = getattr(self.module, "_lazy_call", None)
        callback() if deferred is None else deferred(callback)

    def visible_devices_envs(self) -> list[str]:
        """Return the environment variables that choose which devices a process sees."""
        return [VISIBLE_DEVICES[self.kind]] if self.kind in VISIBLE_DEVICES else []

    def set_visible_devices_envs(self, current_env: dict[str, str], local_accelerator_ids: list[int]) -> None:
        """Write those variables into `current_env` for the given devices."""
        for name in self.visible_devices_envs():
            current_env[name] = ",".join(map(str, local_accelerator_ids))

    def get_compile_backend(self) -> str:
        """Return the torch.compile backend to use."""
        return self._compile_backend

    def set_compile_backend(self, backend: str) -> None:
        """Choose the torch.compile backend to use."""
        self._compile_backend = backend
