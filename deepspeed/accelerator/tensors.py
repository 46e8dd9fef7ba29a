"""Constructors of tensors on the device by dtype, under the names of torch's old tensor classes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from deepspeed.accelerator.devices import Devices

Constructor = Callable[..., torch.Tensor]


class Tensors(Devices):
    """``accelerator.LongTensor([1, 2])`` is a tensor of that dtype on the current device."""

    @property
    def BFloat16Tensor(self) -> Constructor:
        """Make a bf16 tensor from data."""
        return self._of(torch.bfloat16)

    @property
    def HalfTensor(self) -> Constructor:
        """Make an fp16 tensor from data."""
        return self._of(torch.float16)

    @property
    def FloatTensor(self) -> Constructor:
        """Make an fp32 tensor from data."""
        return self._of(torch.float32)

    @property
    def DoubleTensor(self) -> Constructor:
        """Make an fp64 tensor from data."""
        return self._of(torch.float64)

    @property
    def ByteTensor(self) -> Constructor:
        """Make a uint8 tensor from data."""
        return self._of(torch.uint8)

    @property
    def IntTensor(self) -> Constructor:
        """Make an int32 tensor from data."""
        return self._of(torch.int32)

    @property
    def LongTensor(self) -> Constructor:
        """Make an int64 tensor from data."""
        return self._of(torch.int64)

    def _of(self, dtype: torch.dtype) -> Constructor:
        options: dict[str, Any] = {"dtype": dtype, "device": self.current_device_name()}
        return partial(torch.tensor, **options)
