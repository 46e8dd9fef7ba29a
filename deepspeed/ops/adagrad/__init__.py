"""Adagrad: steps shrink with the sum of squared gradients (Duchi, Hazan, Singer; JMLR 12, 2011)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from deepspeed.errors import ConfigError
from deepspeed.ops.pieces import pieces
from deepspeed.ops.stepping import LeafOptimizer, assign, check_numbers, count_step, scaled, wide


class DeepSpeedCPUAdagrad(LeafOptimizer):
    """Adagrad with the original's arguments and those of ``torch.optim.Adagrad``, on any device.

    Args:
        model_params: parameters or param groups.
        lr: learning rate.
        eps: added to the denominator.
        weight_decay: added to the gradient.
        amsgrad: not supported.
        fp32_optimizer_states: keep the sum in fp32; False: in the parameters' dtype.
        lr_decay: after n steps the rate is ``lr / (1 + (n - 1) * lr_decay)``.
        initial_accumulator_value: what the sum starts from.
        adamw_mode: not supported; here because Accelerate passes False to every host optimizer.
    """

    elementwise = True

    def __init__(
        self,
        model_params: Iterable[Any],
        lr: float = 1e-2,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        fp32_optimizer_states: bool = True,
        lr_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        adamw_mode: bool = False,
    ) -> None:
        for variant, asked in (("amsgrad", amsgrad), ("adamw_mode", adamw_mode)):
            if asked:
                raise ConfigError(f"{variant}: expected False, got True; Adagrad has no such variant")
        numbers = {
            "lr": lr,
            "eps": eps,
            "weight_decay": weight_decay,
            "lr_decay": lr_decay,
            "initial_accumulator_value": initial_accumulator_value,
        }
        check_numbers(**numbers)
        super().__init__(model_params, numbers)
        if not fp32_optimizer_states:
            self.narrow_states()

    @torch.no_grad()
    def update_leaf(
        self,
        leaf: Tensor,
        group: dict[str, Any],
        grad: Tensor,
        *,
        out: Tensor | None = None,
        scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        state = self._state_of(leaf, sum=group["initial_accumulator_value"])
        step = count_step(state, found_inf)
        rate = group["lr"] / (1 + (step - 1) * group["lr_decay"])
        for weight, part, squares, low in pieces(leaf, grad, state["sum"], out):
            g = scaled(part, scale) + group["weight_decay"] * wide(weight)
            total = wide(squares) + g * g
            assign(weight, wide(weight) - rate * g / (total.sqrt() + group["eps"]), found_inf)
            assign(squares, total, found_inf)
            if low is not None:
                low.copy_(weight)


__all__ = ["DeepSpeedCPUAdagrad"]
