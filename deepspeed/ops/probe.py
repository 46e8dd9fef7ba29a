"""Find out whether an optimizer may be run on pieces of parameters, by running it.

A flag that says "trust this optimizer" does not make it right. So a copy of the optimizer takes two steps on
a small matrix, and again on the same numbers cut into two flat pieces: equal results mean that every element
is updated by itself, and any sharding is right.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

ELEMENTWISE = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Rprop,
    torch.optim.ASGD,
)
"""Classes known to be element-wise; a subclass may override their step, so only the classes themselves."""

SHAPES = ((4, 6), (3, 5))
CUT = 7


def is_elementwise(optimizer: torch.optim.Optimizer) -> bool:
    """Whether updating pieces of a parameter gives the pieces of the updated parameter."""
    declared = getattr(optimizer, "elementwise", None)
    if declared is not None or getattr(optimizer, "whole_parameters", False):
        return bool(declared)
    if type(optimizer) in ELEMENTWISE:
        return True
    whole, grads = _probe_values(SHAPES[:1])
    updated = _run(optimizer, whole, grads)
    pieces = []
    for cut in (slice(None, CUT), slice(CUT, None)):
        piece = _run(optimizer, [_flat(whole[0])[cut]], [[_flat(step[0])[cut]] for step in grads])
        pieces.append(piece)
    if updated is None or any(piece is None for piece in pieces):
        return False
    together = torch.cat([piece[0] for piece in pieces if piece is not None])
    return torch.allclose(_flat(updated[0]), together, rtol=1e-5, atol=1e-7)


def is_per_parameter(optimizer: torch.optim.Optimizer) -> bool:
    """Whether every parameter is updated without looking at the others."""
    if getattr(optimizer, "elementwise", False) or getattr(optimizer, "whole_parameters", False):
        return True
    values, grads = _probe_values(SHAPES)
    together = _run(optimizer, values, grads)
    apart = [_run(optimizer, [values[i]], [[step[i]] for step in grads]) for i in range(len(values))]
    if together is None or any(result is None for result in apart):
        return False
    return all(
        torch.allclose(result[0], expected, rtol=1e-5, atol=1e-7)
        for result, expected in zip(apart, together, strict=True)
        if result is not None
    )


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1)


def _probe_values(shapes: Sequence[tuple[int, ...]]) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Return random weights, and gradients for two steps whose sizes differ between parameters."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator) for shape in shapes]
    grads = [
        [torch.randn(shape, generator=generator) * 10**index for index, shape in enumerate(shapes)]
        for _ in range(2)
    ]
    return weights, grads


def _run(
    optimizer: torch.optim.Optimizer, weights: Sequence[Tensor], grads: Sequence[Sequence[Tensor]]
) -> list[Tensor] | None:
    """Step a stateless copy of `optimizer` on copies of `weights`; None where it cannot be run so."""
    params = [torch.nn.Parameter(weight.clone()) for weight in weights]
    twin = copy.copy(optimizer)
    twin.state = defaultdict(dict)
    options: dict[str, Any] = {
        key: value for key, value in optimizer.param_groups[0].items() if key != "params"
    }
    twin.param_groups = [{**copy.deepcopy(options), "params": params}]
    with torch.random.fork_rng(devices=[]):
        try:
            for step in grads:
                for param, grad in zip(params, step, strict=True):
                    param.grad = grad.clone()
                type(optimizer).step(twin)
        except Exception:  # whatever a foreign optimizer raises on plain tensors, it cannot be served
            return None
    return [param.detach() for param in params]
