"""Lion: the sign of an interpolated momentum (arXiv 2302.06675)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from deepspeed.errors import ConfigError
from deepspeed.ops.pieces import pieces
from deepspeed.ops.stepping import LeafOptimizer, assign, check_betas, check_numbers, count_step, scaled, wide


class FusedLion(LeafOptimizer):
    """Lion with decoupled weight decay.

    Args:
        params: parameters or param groups.
        lr: learning rate; a third to a tenth of Adam's.
        betas: interpolation of the update, and decay of the momentum.
        weight_decay: weight decay.
        set_grad_none: what ``zero_grad`` does; must be True.
    """

    elementwise = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        set_grad_none: bool = True,
    ) -> None:
        check_numbers(lr=lr, weight_decay=weight_decay)
        check_betas(betas)
        if not set_grad_none:
            raise ConfigError("set_grad_none: expected True, got False; zero_grad(set_to_none=False) fills")
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay})

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
        state = self._state_of(leaf, exp_avg=0.0)
        count_step(state, found_inf)
        beta1, beta2 = group["betas"]
        shrink = 1 - group["lr"] * group["weight_decay"]
        for weight, part, average, low in pieces(leaf, grad, state["exp_avg"], out):
            g, momentum = scaled(part, scale), wide(average)
            direction = torch.lerp(g, momentum, beta1).sign_()
            assign(weight, wide(weight) * shrink - group["lr"] * direction, found_inf)
            assign(average, torch.lerp(g, momentum, beta2), found_inf)
            if low is not None:
                low.copy_(weight)


class DeepSpeedCPULion(FusedLion):
    """`FusedLion` with the arguments of the original's host optimizer.

    Args:
        model_params: parameters or param groups.
        fp32_optimizer_states: keep the momentum in fp32; False: in the parameters' dtype.
        adamw_mode: not supported; here because Accelerate passes False to every host optimizer.
    """

    def __init__(
        self,
        model_params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        fp32_optimizer_states: bool = True,
        adamw_mode: bool = False,
    ) -> None:
        if adamw_mode:
            raise ConfigError("adamw_mode: expected False, got True; Lion has no such variant")
        super().__init__(model_params, lr=lr, betas=betas, weight_decay=weight_decay)
        if not fp32_optimizer_states:
            self.narrow_states()


__all__ = ["DeepSpeedCPULion", "FusedLion"]
