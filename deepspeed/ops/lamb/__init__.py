"""LAMB: Adam with a trust ratio for every parameter (arXiv 1904.00962).

Note [Bias correction outside the ratio]
The paper corrects the moments, so the trust ratio cancels most of the correction. The original applies it to
the learning rate instead, which starts training slower: recipes were tuned with that, and it is done here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from deepspeed.errors import ConfigError
from deepspeed.ops.stepping import LeafOptimizer, assign, check_betas, check_numbers, count_step, scaled, wide


class FusedLamb(LeafOptimizer):
    """LAMB with decoupled weight decay.

    Args:
        params: parameters or param groups.
        lr: learning rate.
        bias_correction: correct for the moments' start at zero; see Note [Bias correction outside the ratio].
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
        if amsgrad:
            raise ConfigError("amsgrad: expected False, got True; Lamb has no such variant")
        if max_grad_norm:
            raise ConfigError(
                f"max_grad_norm: expected 0, got {max_grad_norm}; use gradient_clipping to clip"
            )
        check_numbers(lr=lr, eps=eps, weight_decay=weight_decay, max_coeff=max_coeff, min_coeff=min_coeff)
        check_betas(betas)
        defaults = {
            "lr": lr,
            "bias_correction": bias_correction,
            "betas": tuple(betas),
            "eps": eps,
            "eps_inside_sqrt": eps_inside_sqrt,
            "weight_decay": weight_decay,
            "max_coeff": max_coeff,
            "min_coeff": min_coeff,
        }
        super().__init__(params, defaults)

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
        state = self._state_of(leaf, exp_avg=0.0, exp_avg_sq=0.0)
        step = count_step(state, found_inf)
        beta1, beta2 = group["betas"]
        g, weight = scaled(grad, scale), wide(leaf)
        first = wide(state["exp_avg"]) * beta1 + g * (1 - beta1)
        second = wide(state["exp_avg_sq"]) * beta2 + g * g * (1 - beta2)
        update = self._direction(first, second, group) + group["weight_decay"] * weight
        rate = self._rate(step, group) * self._trust_ratio(weight, update, group)
        assign(leaf, weight - rate * update, found_inf)
        assign(state["exp_avg"], first, found_inf)
        assign(state["exp_avg_sq"], second, found_inf)
        if out is not None:
            out.copy_(leaf)

    def _direction(self, first: Tensor, second: Tensor, group: dict[str, Any]) -> Tensor:
        eps: float = group["eps"]
        return first / ((second + eps).sqrt() if group["eps_inside_sqrt"] else second.sqrt() + eps)

    def _rate(self, step: Tensor, group: dict[str, Any]) -> Tensor:
        """The learning rate with the bias correction."""
        lr: float = group["lr"]
        if not group["bias_correction"]:
            return torch.full_like(step, lr)
        (beta1, beta2), count = group["betas"], step.double()
        corrected: Tensor = lr * (1 - beta2**count).sqrt() / (1 - beta1**count)
        return corrected.float()

    def _trust_ratio(self, weight: Tensor, update: Tensor, group: dict[str, Any]) -> Tensor:
        """The weight's norm over the update's, within bounds; 1 where either is zero."""
        weight_norm, update_norm = torch.linalg.vector_norm(weight), torch.linalg.vector_norm(update)
        ratio = (weight_norm / update_norm).clamp(group["min_coeff"], group["max_coeff"])
        return torch.where((weight_norm > 0) & (update_norm > 0), ratio, torch.ones_like(ratio))


__all__ = ["FusedLamb"]
