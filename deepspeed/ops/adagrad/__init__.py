"""Adagrad under the name of the original's host optimizer; the arithmetic is torch's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from deepspeed.errors import ConfigError


class DeepSpeedCPUAdagrad(torch.optim.Adagrad):
    """``torch.optim.Adagrad`` with the original's arguments and defaults.

    Args:
        model_params: parameters or param groups.
        lr: learning rate.
        eps: added to the denominator.
        weight_decay: added to the gradient.
        amsgrad: not supported.
    """

    elementwise = True

    def __init__(
        self,
        model_params: Iterable[Any],
        lr: float = 1e-2,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
    ) -> None:
        if amsgrad:
            raise ConfigError("amsgrad: expected False, got True; Adagrad has no such variant")
        super().__init__(model_params, lr=lr, eps=eps, weight_decay=weight_decay)


__all__ = ["DeepSpeedCPUAdagrad"]
