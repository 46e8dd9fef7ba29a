"""Move the states of an idle engine to the host and back, for the time that something else needs the device.

Views stay valid: a storage is copied, then resized to nothing, and filled again on return (see note [Memory
that comes and goes] in unit.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from deepspeed.accelerator import get_accelerator
from deepspeed.errors import NotBuiltError, UsageError


class OffloadStateTypeEnum(str, Enum):
    """States that can be moved."""

    optim_states = "optim_states"
    hp_params = "hp_params"
    lp_params = "lp_params"
    lp_grads = "lp_grads"
    contiguous_grad_buffer = "contiguous_grad_buffer"


class OffloadDeviceEnum(str, Enum):
    """Where states can be."""

    none = "none"
    cpu = "cpu"
    nvme = "nvme"


class Parking:
    """Where states wait.

    Args:
        find: returns the tensors of one kind of state as they are now.
    """

    def __init__(self, find: Callable[[OffloadStateTypeEnum], Iterable[Tensor]]) -> None:
        self._find = find
        self._parked: list[tuple[Tensor, Tensor]] = []  # (view of a whole storage, its copy)

    @property
    def is_empty(self) -> bool:
        """Whether everything is where it belongs."""
        return not self._parked

    def offload_states(
        self,
        include: Iterable[Any] | None = None,
        device: Any = OffloadDeviceEnum.cpu,
        pin_memory: bool = True,
        non_blocking: bool = False,
    ) -> None:
        """Move states away.

        Args:
            include: kinds of states (`OffloadStateTypeEnum` or their names); None: all.
            device: "cpu".
            pin_memory: page-locked copies, where there is a device.
            non_blocking: let the copies run on; `reload_states` waits for them.

        Raises:
            UsageError: states are away already, or a kind does not exist.
            NotBuiltError: another device.
        """
        if getattr(device, "value", str(device)) != "cpu":
            raise NotBuiltError(
                f"offload_states: device: expected cpu, got {device}; others are not built yet"
            )
        if self._parked:
            raise UsageError("offload_states: states are away already; call reload_states first")
        kinds = list(OffloadStateTypeEnum) if include is None else [_kind(one) for one in include]
        storages = {one.untyped_storage().data_ptr(): one for kind in kinds for one in self._find(kind)}
        for tensor in storages.values():
            whole = _whole_storage(tensor)
            if whole.numel() > 0:
                pinned = pin_memory and whole.device.type != "cpu"
                copy = torch.empty(whole.shape, dtype=whole.dtype, device="cpu", pin_memory=pinned)
                copy.copy_(whole, non_blocking=non_blocking and pinned)
                self._parked.append((whole, copy))
        get_accelerator().synchronize()
        for whole, _ in self._parked:
            whole.untyped_storage().resize_(0)
        get_accelerator().empty_cache()

    def reload_states(self, non_blocking: bool = False) -> None:
        """Bring everything back; nothing if nothing is away."""
        for whole, copy in self._parked:
            whole.untyped_storage().resize_(copy.numel())
            whole.copy_(copy, non_blocking=non_blocking)
        self._parked = []


def _whole_storage(tensor: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def _kind(value: Any) -> OffloadStateTypeEnum:
    try:
        return OffloadStateTypeEnum(getattr(value, "value", value))
    except ValueError:
        names = ", ".join(one.value for one in OffloadStateTypeEnum)
        raise UsageError(f"offload_states: include: expected some of {names}, got {value!r}") from None
