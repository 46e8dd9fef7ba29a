"""Optimizers by the names that configurations use."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from deepspeed.common.signatures import check_arguments
from deepspeed.errors import ConfigError, NotBuiltError, did_you_mean
from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
from deepspeed.ops.adam import FusedAdam
from deepspeed.ops.lamb import FusedLamb
from deepspeed.ops.lion import FusedLion
from deepspeed.ops.muon import MuonWithAuxAdam, split_muon_groups

Groups = list[dict[str, Any]]
WHERE = "optimizer.params"


def build_optimizer(type_name: str, params: dict[str, Any], groups: Groups) -> torch.optim.Optimizer:
    """Build the optimizer that ``optimizer.type`` and ``optimizer.params`` describe.

    Args:
        type_name: one of `OPTIMIZER_NAMES` in any case, or the name of a class in ``torch.optim``.
        params: arguments of its constructor.
        groups: param groups of the user's parameters.

    Raises:
        NotBuiltError: the original has it, this release does not.
        ConfigError: no such optimizer or argument; the message names the nearest one.
    """
    name = type_name.lower()
    if name in NOT_BUILT:
        raise NotBuiltError(
            f"optimizer.type: {type_name} is not built yet; use one of {', '.join(OPTIMIZER_NAMES)}"
        )
    if params.get("max_grad_norm"):
        raise ConfigError(
            f"{WHERE}.max_grad_norm: expected it to be absent, got {params['max_grad_norm']!r}; "
            "the top-level key gradient_clipping clips"
        )
    params = {key: value for key, value in params.items() if key != "max_grad_norm"}
    if name in ("adam", "adamw"):
        return _adam(params, groups)
    if name == "muon":
        return _make(MuonWithAuxAdam, params, split_muon_groups(groups))
    return _make(_CLASSES.get(name) or _from_torch(type_name), params, groups)


def _adam(params: dict[str, Any], groups: Groups) -> torch.optim.Optimizer:
    if _flag(params, "torch_adam", default=False):
        decoupled = _flag(params, "adam_w_mode", default=True)
        return _make(torch.optim.AdamW if decoupled else torch.optim.Adam, params, groups)
    wide = _flag(params, "fp32_optimizer_states", default=True)
    made = _make(FusedAdam, params, groups)
    if isinstance(made, FusedAdam) and not wide:
        made.narrow_states()
    return made


def _flag(params: dict[str, Any], name: str, *, default: bool) -> bool:
    value = params.pop(name, default)
    if value not in (True, False):
        raise ConfigError(f"{WHERE}.{name}: expected true or false, got {value!r}")
    return bool(value)


def _from_torch(type_name: str) -> Callable[..., torch.optim.Optimizer]:
    classes = {
        name: value
        for name, value in vars(torch.optim).items()
        if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer) and name != "Optimizer"
    }
    if type_name in classes:
        return classes[type_name]
    same = [name for name in classes if name.lower() == type_name.lower()]
    hint = f" (did you mean {same[0]!r}?)" if same else did_you_mean(type_name, [*OPTIMIZER_NAMES, *classes])
    raise ConfigError(
        f"optimizer.type: expected {', '.join(OPTIMIZER_NAMES)} or a class of torch.optim, got {type_name!r}{hint}"
    )


def _make(
    cls: Callable[..., torch.optim.Optimizer], params: dict[str, Any], groups: Groups
) -> torch.optim.Optimizer:
    check_arguments(WHERE, cls, params, hidden=("state_dtype",))
    arguments = {key: tuple(value) if isinstance(value, list) else value for key, value in params.items()}
    try:
        return cls(groups, **arguments)
    except ConfigError as error:
        raise type(error)(f"{WHERE}.{error}") from error
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{WHERE}: {getattr(cls, '__name__', cls)} refused them: {error}") from error


_CLASSES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adagrad": DeepSpeedCPUAdagrad,
    "lamb": FusedLamb,
    "lion": FusedLion,
}
OPTIMIZER_NAMES = ("Adam", "AdamW", "Adagrad", "Lamb", "Lion", "Muon")
"""Names with an implementation here; any other is looked up in ``torch.optim``."""

NOT_BUILT = ("onebitadam", "onebitlamb", "zerooneadam", "muadam", "muadamw", "musgd")
"""The original's other names."""
