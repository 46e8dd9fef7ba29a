"""Tensors inside lists, tuples and dicts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def move_to_device(item: Any, device: torch.device | str, non_blocking: bool = False) -> Any:
    """Return `item` with every tensor on `device`; containers are rebuilt with their own type."""
    if isinstance(item, torch.Tensor):
        return item.to(device, non_blocking=non_blocking)
    if isinstance(item, Mapping):
        moved = {key: move_to_device(value, device, non_blocking) for key, value in item.items()}
        return moved if type(item) is dict else type(item)(moved)  # type: ignore[call-arg]
    if isinstance(item, tuple) and hasattr(item, "_fields"):
        return type(item)(*(move_to_device(value, device, non_blocking) for value in item))
    if isinstance(item, (list, tuple)):
        return type(item)(move_to_device(value, device, non_blocking) for value in item)
    return item


def tensors_in(output: Any) -> list[torch.Tensor]:
    """Return the tensors in a module's output: a tensor, containers of them, or an object with attributes."""
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, dict):
        return [tensor for value in output.values() for tensor in tensors_in(value)]
    if isinstance(output, (list, tuple)):
        return [tensor for value in output for tensor in tensors_in(value)]
    return [value for value in getattr(output, "__dict__", {}).values() if isinstance(value, torch.Tensor)]
