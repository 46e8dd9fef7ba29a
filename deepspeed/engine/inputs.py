"""Inputs of forward brought to where, and to what dtype, the module computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


@dataclass(frozen=True)
class InputRules:
    """Where inputs go.

    Attributes:
        device: tensors elsewhere are moved here.
        dtype: floating-point tensors are cast to this; None leaves them.
    """

    device: torch.device
    dtype: torch.dtype | None

    def apply(self, inputs: Any) -> Any:
        """Return `inputs` (any nesting of containers) with its tensors moved and cast."""
        if isinstance(inputs, Tensor):
            return self._place(inputs)
        return tree_map_only(Tensor, self._place, inputs)

    def _place(self, tensor: Tensor) -> Tensor:
        dtype = self.dtype if self.dtype is not None and tensor.is_floating_point() else tensor.dtype
        if tensor.dtype == dtype and tensor.device == self.device:
            return tensor
        return tensor.to(device=self.device, dtype=dtype, non_blocking=True)
