"""Find out whether an optimizer may be run on pieces of parameters, by running it.

A flag that says "trust this optimizer" does not make it right. So a copy of the optimizer takes two steps on
a small matrix, and again on the same numbers cut into two flat pieces: equal results mean that every element
is updated by itself, and any sharding is right.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Sequence
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
    if declared is not None:
        return bool(declared)
    if type(optimizer) in ELEMENTWISE:
        return True
    return all(_splits_elements(optimizer, options) for options in _kinds_of_groups(optimizer))


def is_per_parameter(optimizer: torch.optim.Optimizer) -> bool:
    """Whether every parameter is updated without looking at the others."""
    if getattr(optimizer, "elementwise", False) or getattr(optimizer, "whole_parameters", False):
        return True
    return all(_splits_parameters(optimizer, options) for options in _kinds_of_groups(optimizer))


def state_keys(optimizer: torch.optim.Optimizer) -> set[str] | None:
    """Return the keys of the states that it makes, or None where it cannot be run on other parameters."""
    weights, grads = _probe_values(SHAPES)
    twins = [_stepped(optimizer, options, weights, grads) for options in _kinds_of_groups(optimizer)]
    if None in twins:
        return None
    return {key for twin in twins if twin is not None for state in twin.state.values() for key in state}


def _kinds_of_groups(optimizer: torch.optim.Optimizer) -> Iterator[dict[str, Any]]:
    """Yield the options of each param group, once for equal ones: a flag in them may change the rule."""
    seen: list[str] = []
    for group in optimizer.param_groups:
        options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        if repr(options) not in seen:
            seen.append(repr(options))
            yield options


def _splits_elements(optimizer: torch.optim.Optimizer, options: dict[str, Any]) -> bool:
    weights, grads = _probe_values(SHAPES[:1])
    whole = _run(optimizer, options, weights, grads)
    pieces = [
        _run(optimizer, options, [_flat(weights[0])[cut]], [[_flat(step[0])[cut]] for step in grads])
        for cut in (slice(None, CUT), slice(CUT, None))
    ]
    if whole is None or any(piece is None for piece in pieces):
        return False
    return _equal(_flat(whole[0]), torch.cat([piece[0] for piece in pieces if piece is not None]))


def _splits_parameters(optimizer: torch.optim.Optimizer, options: dict[str, Any]) -> bool:
    weights, grads = _probe_values(SHAPES)
    together = _run(optimizer, options, weights, grads)
    if together is None:
        return False
    for index, expected in enumerate(together):
        alone = _run(optimizer, options, [weights[index]], [[step[index]] for step in grads])
        if alone is None or not _equal(alone[0], expected):
            return False
    return True


def _equal(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-5, atol=1e-7)


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
    optimizer: torch.optim.Optimizer,
    options: dict[str, Any],
    weights: Sequence[Tensor],
    grads: Sequence[Sequence[Tensor]],
) -> list[Tensor] | None:
    """Step a stateless copy of `optimizer` on copies of `weights`; None where it cannot be run so."""
    twin = _stepped(optimizer, options, weights, grads)
    return None if twin is None else [param.detach() for param in twin.param_groups[0]["params"]]


def _stepped(
    optimizer: torch.optim.Optimizer,
    options: dict[str, Any],
    weights: Sequence[Tensor],
    grads: Sequence[Sequence[Tensor]],
) -> torch.optim.Optimizer | None:
    if any(isinstance(value, torch.optim.Optimizer) for value in vars(optimizer).values()):
        return None  # it steps another optimizer, which holds the real parameters
    device = _device_of(optimizer)
    params = [torch.nn.Parameter(weight.to(device, copy=True)) for weight in weights]
    twin = _stateless_twin(optimizer, {**copy.deepcopy(options), "params": params})
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device], device_type=device.type):
        try:
            if hasattr(twin, "train"):  # schedule-free optimizers take steps only in this mode
                twin.train()
            for step in grads:
                for param, grad in zip(params, step, strict=True):
                    param.grad = grad.to(device, copy=True)
                type(optimizer).step(twin)
        except Exception:  # whatever a foreign optimizer raises on plain tensors, it cannot be served
            return None
    return twin


def _device_of(optimizer: torch.optim.Optimizer) -> torch.device:
    """Where its parameters are: some optimizers refuse any other device."""
    devices = [param.device for group in optimizer.param_groups for param in group["params"]]
    return devices[0] if devices and devices[0].type != "meta" else torch.device("cpu")


def _stateless_twin(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> torch.optim.Optimizer:
    """Copy an optimizer's attributes, one level deep, without its parameters, state and hooks."""
    twin: torch.optim.Optimizer = object.__new__(type(optimizer))
    for name, value in vars(optimizer).items():
        plain = isinstance(value, (dict, list, set))
        if isinstance(value, OrderedDict) and name.endswith("_hooks"):
            value = OrderedDict()
        vars(twin)[name] = copy.copy(value) if plain else value
    twin.state = defaultdict(dict)
    twin.param_groups = [group]
    return twin
