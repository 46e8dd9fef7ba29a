"""OnDevice: construct a model on a device (``meta`` to cost nothing) and in a dtype."""

from __future__ import annotations

from typing import Any

import torch

from deepspeed.zero import constructors
from deepspeed.zero.init import CONSTRUCTORS


class OnDevice:
    """Context in which tensors are made in `dtype` on `device`.

    Args:
        dtype: of floating-point tensors.
        device: "meta" allocates nothing; `deepspeed.initialize` needs a model with values.
        enabled: False does nothing.
    """

    def __init__(self, dtype: torch.dtype, device: str | torch.device = "meta", enabled: bool = True) -> None:
        self._dtype, self._device, self._enabled = dtype, torch.device(device), enabled
        self._patched = False

    def __enter__(self) -> OnDevice:
        if self._enabled and not constructors.is_patched():
            constructors.patch_tensors(CONSTRUCTORS, constructors.with_target, self._dtype, self._device)
            self._patched = True
        return self

    def __exit__(self, *error: Any) -> None:
        if self._patched:
            constructors.unpatch()
            self._patched = False
