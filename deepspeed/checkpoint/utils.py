"""State dicts on their way to a file."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


def clone_tensors_for_torch_save(item: Any, device: torch.device | str = "cpu") -> Any:
    """Return a copy of nested dicts, lists and tuples whose tensors own their memory, on `device`.

    Parameters are views of a unit's flat; ``torch.save`` of a view writes everything it is a view of.
    """
    return tree_map_only(Tensor, lambda tensor: tensor.detach().to(device, copy=True), item)
