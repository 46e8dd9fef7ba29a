"""Muon: momentum whose matrices are orthogonalised, and Adam for everything else.

Source: Keller Jordan, "Muon: an optimizer for hidden layers in neural networks" (2024).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from deepspeed.errors import ConfigError
from deepspeed.ops.adam import FusedAdam
from deepspeed.ops.stepping import LeafOptimizer, assign, check_betas, check_numbers, count_step, scaled, wide

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration that drives all singular values towards 1."""

MUON_LR, ADAM_LR = 0.02, 3e-4


class MuonWithAuxAdam(LeafOptimizer):
    """Muon for groups with ``use_muon``, Adam for the others.

    Args:
        params: param groups; `split_muon_groups` marks them.
        lr: rate of both parts where they have none of their own.
        muon_lr, adam_lr: rate of each part (defaults 0.02 and 3e-4).
        momentum: of Muon.
        weight_decay: decoupled, of both.
        betas, eps: of Adam.
        ns_steps: iterations of the orthogonalisation.
        ns_method: "standard" iterates on the matrix, "gram" on its smaller Gram matrix; equal results.
    """

    whole_parameters = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | None = None,
        muon_lr: float | None = None,
        adam_lr: float | None = None,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-10,
        ns_steps: int = 5,
        ns_method: str = "gram",
    ) -> None:
        if ns_method not in ("gram", "standard"):
            raise ConfigError(f'ns_method: expected "gram" or "standard", got {ns_method!r}')
        if ns_steps < 1:
            raise ConfigError(f"ns_steps: expected a number of at least 1, got {ns_steps}")
        if not 0 <= momentum < 1:
            raise ConfigError(f"momentum: expected a number in [0, 1), got {momentum}")
        given = {"lr": lr, "muon_lr": muon_lr, "adam_lr": adam_lr}
        check_numbers(**{name: rate for name, rate in given.items() if rate is not None})
        check_numbers(eps=eps, weight_decay=weight_decay)
        check_betas(betas)
        rates = {True: _first(muon_lr, lr, MUON_LR), False: _first(adam_lr, lr, ADAM_LR)}
        groups = [group if isinstance(group, dict) else {"params": [group]} for group in params]
        groups = [{"lr": rates[bool(group.get("use_muon"))], **group} for group in groups]
        _check_matrices(groups)
        defaults = {
            "lr": rates[True],
            "momentum": momentum,
            "weight_decay": weight_decay,
            "betas": tuple(betas),
            "eps": eps,
            "bias_correction": True,
            "use_muon": False,
            "ns_steps": ns_steps,
            "ns_method": ns_method,
        }
        super().__init__(groups, defaults)
        self._adam = FusedAdam([torch.zeros(1)])

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._adam = FusedAdam([torch.zeros(1)])

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
        if not group["use_muon"]:
            self._adam.state, self._adam.state_dtype = self.state, self.state_dtype
            self._adam.update_leaf(leaf, group, grad, out=out, scale=scale, found_inf=found_inf)
            return
        state = self._state_of(leaf, momentum_buffer=0.0)
        count_step(state, found_inf)
        g, buffer = scaled(grad, scale), state["momentum_buffer"]
        momentum = torch.lerp(g, wide(buffer), group["momentum"])
        nesterov = torch.lerp(g, momentum, group["momentum"])
        update = orthogonalise(nesterov, group["ns_steps"], group["ns_method"])
        rows, columns = update.shape[0], update[0].numel()
        update = update * max(1.0, rows / columns) ** 0.5
        weight = wide(leaf) * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * update
        assign(leaf, weight, found_inf)
        assign(buffer, momentum, found_inf)
        if out is not None:
            out.copy_(leaf)


def _first(*rates: float | None) -> float:
    return next(rate for rate in rates if rate is not None)


def _check_matrices(groups: list[dict[str, Any]]) -> None:
    for group in groups:
        for param in group["params"] if group.get("use_muon") else ():
            if param.dim() < 2:
                raise ConfigError(
                    f"use_muon: expected parameters of two or more dimensions, got shape {tuple(param.shape)}; "
                    "put it in a group without use_muon, where Adam updates it"
                )


def orthogonalise(matrix: Tensor, steps: int = 5, method: str = "gram") -> Tensor:
    """Return the nearest matrix with orthonormal rows or columns, roughly (Newton-Schulz).

    On an accelerator the standard method multiplies in bf16, which the iteration forgives. The Gram matrix
    squares the singular values, so that method stays in the matrix's own dtype.

    Args:
        matrix: [rows, ...]; further dimensions are flattened to columns.
        steps: iterations.
        method: see `MuonWithAuxAdam`.
    """
    flat = matrix.reshape(matrix.shape[0], -1)
    tall = flat.shape[0] > flat.shape[1]
    x = flat.mT if tall else flat
    x = x / (torch.linalg.vector_norm(x) + 1e-7)
    if method == "gram":
        result = _iterate_on_gram(x, steps)
    else:
        low = x if x.device.type == "cpu" else x.bfloat16()
        result = _iterate_on_matrix(low, steps).to(x.dtype)
    return (result.mT if tall else result).reshape(matrix.shape)


def _iterate_on_matrix(x: Tensor, steps: int) -> Tensor:
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def _iterate_on_gram(x: Tensor, steps: int) -> Tensor:
    """Collect the factors in the small square Gram matrix, and touch the wide one twice only."""
    a, b, c = COEFFICIENTS
    gram = x @ x.mT
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    product = eye
    for _ in range(steps):
        factor = a * eye + b * gram + c * gram @ gram
        product = factor @ product
        gram = factor @ gram @ factor
    return product @ x


def split_muon_groups(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Split param groups into Muon's (matrices) and Adam's (the rest), unless they are marked already.

    A parameter belongs to Muon if it is marked ``use_muon`` itself, or, where nothing is marked, if it has two
    dimensions or more.
    """
    split = []
    for group in groups:
        if "use_muon" in group:
            split.append(group)
            continue
        for use_muon in (True, False):
            params = [param for param in group["params"] if _is_matrix(param) == use_muon]
            if params:
                split.append({**group, "params": params, "use_muon": use_muon})
    return split


def _is_matrix(param: Tensor) -> bool:
    return bool(getattr(param, "use_muon", param.dim() >= 2))


__all__ = ["MuonWithAuxAdam", "orthogonalise", "split_muon_groups"]
