"""LAMB: Adam with a trust ratio for every parameter (arXiv 1904.00962)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from deepspeed.errors import ConfigError
from deepspeed.ops.stepping import LeafOptimizer, assign, count_step, new_moments, scaled


class FusedLamb(LeafOptimizer):
    """LAMB with decoupled weight decay.

    Args:
        params: parameters or param groups.
        lr: learning rate.
        bias_correction: correct the moments for their start at zero.
        betas: decay rates of the moments.
        eps: added to the denominator.
        eps_inside_sqrt: add it under the root instead.
        weight_decay: weight decay, part of the update that the trust ratio scales.
        max_grad_norm: not supported; the engine clips.
        max_coeff, min_coeff: bounds of the trust ratio.
        amsgrad: not supported.
    """

    whole_parameters = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        eps_inside_sqrt: bool = False,
        weight_decay: float = 0.0,
        max_grad_norm: float = 0.0,
        max_coeff: float = 10.0,
        min_coeff: float = 0.01,
        amsgrad: bool = False,
    ) -> None:
        if amsgrad or max_grad_norm:
            raise ConfigError(
                "Lamb: expected amsgrad=False and max_grad_norm=0; use gradient_clipping to clip"
            )
        defaults = {
            "lr": lr,
            "bias_correction": bias_correction,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "max_coeff": max_coeff,
            "min_coeff": min_coeff,
        }
        super().__init__(params, defaults)
        self.eps_inside_sqrt = eps_inside_sqrt

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
        new_moments(state, leaf, "exp_avg", "exp_avg_sq")
        step = count_step(state, found_inf)
        beta1, beta2 = group["betas"]
        g = scaled(grad, scale)
        first = state["exp_avg"] * beta1 + g * (1 - beta1)
        second = state["exp_avg_sq"] * beta2 + g * g * (1 - beta2)
        update = self._direction(first, second, step, group) + group["weight_decay"] * leaf
        ratio = self._trust_ratio(leaf, update, group)
        assign(leaf, leaf - group["lr"] * ratio * update, found_inf)
        assign(state["exp_avg"], first, found_inf)
        assign(state["exp_avg_sq"], second, found_inf)
        if out is not None:
            out.copy_(leaf)

    def _direction(self, first: Tensor, second: Tensor, step: Tensor, group: dict[str, Any]) -> Tensor:
        if group["bias_correction"]:
            count, (beta1, beta2) = step.double(), group["betas"]
            first = first / (1 - beta1**count).to(first.dtype)
            second = second / (1 - beta2**count).to(second.dtype)
        if self.eps_inside_sqrt:
            return torch.div(first, (second + group["eps"]).sqrt())
        return torch.div(first, second.sqrt() + group["eps"])

    def _trust_ratio(self, leaf: Tensor, update: Tensor, group: dict[str, Any]) -> Tensor:
        """The weight's norm over the update's, within bounds; 1 where either is zero."""
        weight_norm, update_norm = torch.linalg.vector_norm(leaf), torch.linalg.vector_norm(update)
        ratio = (weight_norm / update_norm).clamp(group["min_coeff"], group["max_coeff"])
        return torch.where((weight_norm > 0) & (update_norm > 0), ratio, torch.ones_like(ratio))


__all__ = ["FusedLamb"]
