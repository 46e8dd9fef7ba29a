"""Lion: the sign of an interpolated momentum (arXiv 2302.06675)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from deepspeed.errors import ConfigError
from deepspeed.ops.stepping import LeafOptimizer, assign, count_step, new_moments, scaled


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
        if lr < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ConfigError(
                "Lion: expected lr, weight_decay >= 0 and betas in [0, 1), got "
                f"lr={lr}, weight_decay={weight_decay}, betas={tuple(betas)}"
            )
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
        state = self.state[leaf]
        new_moments(state, leaf, "exp_avg")
        count_step(state, found_inf)
        beta1, beta2 = group["betas"]
        g, momentum = scaled(grad, scale), state["exp_avg"]
        direction = torch.lerp(g, momentum, beta1).sign_()
        weight = leaf * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * direction
        assign(leaf, weight, found_inf)
        assign(momentum, torch.lerp(g, momentum, beta2), found_inf)
        if out is not None:
            out.copy_(leaf)


class DeepSpeedCPULion(FusedLion):
    """`FusedLion` under the name of the original's host optimizer."""


__all__ = ["DeepSpeedCPULion", "FusedLion"]
