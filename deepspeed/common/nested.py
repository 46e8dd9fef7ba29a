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
