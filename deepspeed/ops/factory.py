"""Optimizers by the names that configurations use."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from deepspeed.errors import ConfigError, did_you_mean
from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
from deepspeed.ops.adam import FusedAdam
from deepspeed.ops.lamb import FusedLamb
from deepspeed.ops.lion import FusedLion
from deepspeed.ops.muon import MuonWithAuxAdam, split_muon_groups

Groups = list[dict[str, Any]]


def build_optimizer(type_name: str, params: dict[str, Any], groups: Groups) -> torch.optim.Optimizer:
    """Build the optimizer that ``optimizer.type`` and ``optimizer.params`` describe.

    Args:
        type_name: one of `OPTIMIZER_NAMES` in any case, or the name of a class in ``torch.optim``.
        params: arguments of its constructor.
        groups: param groups of the user's parameters.

    Raises:
        ConfigError: no such optimizer or argument; the message names the nearest one.
    """
    name = type_name.lower()
    if name in ("adam", "adamw"):
        return _adam(name, dict(params), groups)
    if name == "muon":
        return _make(MuonWithAuxAdam, params, split_muon_groups(groups))
    if name in _CLASSES:
        return _make(_CLASSES[name], params, groups)
    return _make(_from_torch(type_name), params, groups)


def _adam(name: str, params: dict[str, Any], groups: Groups) -> torch.optim.Optimizer:
    decoupled = bool(params.pop("adam_w_mode", True))
    if params.pop("torch_adam", False):
        return _make(torch.optim.AdamW if decoupled else torch.optim.Adam, params, groups)
    narrow_states = params.pop("fp32_optimizer_states", True) is False
    if narrow_states:
        params["state_dtype"] = groups[0]["params"][0].dtype
    return _make(FusedAdam, {**params, "adam_w_mode": decoupled}, groups)


def _from_torch(type_name: str) -> type[torch.optim.Optimizer]:
    found = getattr(torch.optim, type_name, None)
    if inspect.isclass(found) and issubclass(found, torch.optim.Optimizer):
        return found
    known = [*OPTIMIZER_NAMES, *(key for key, value in vars(torch.optim).items() if inspect.isclass(value))]
    raise ConfigError(
        f"optimizer.type: expected {', '.join(OPTIMIZER_NAMES)} or a class of torch.optim, got {type_name!r}"
        + did_you_mean(type_name, known)
    )


def _make(
    cls: Callable[..., torch.optim.Optimizer], params: dict[str, Any], groups: Groups
) -> torch.optim.Optimizer:
    accepted = [
        name for name in inspect.signature(cls).parameters if name not in ("self", "params", "model_params")
    ]
    for key in params:
        if key not in accepted:
            raise ConfigError(
                f"optimizer.params.{key}: {_name_of(cls)} has no such argument{did_you_mean(key, accepted)}; "
                f"it takes {', '.join(accepted)}"
            )
    try:
        return cls(
            groups,
            **{key: tuple(value) if isinstance(value, list) else value for key, value in params.items()},
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"optimizer.params: {_name_of(cls)} refused them: {error}") from error


def _name_of(cls: Callable[..., Any]) -> str:
    return getattr(cls, "__name__", str(cls))


_CLASSES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adagrad": DeepSpeedCPUAdagrad,
    "lamb": FusedLamb,
    "lion": FusedLion,
}
OPTIMIZER_NAMES = ("Adam", "AdamW", "Adagrad", "Lamb", "Lion", "Muon")
"""Names with an implementation here; any other is looked up in ``torch.optim``."""
