"""Which optimizer an engine uses, and what kind of leaves it can be given."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from deepspeed.config import DeepSpeedConfig
from deepspeed.errors import ConfigError
from deepspeed.ops.adam import FusedAdam
from deepspeed.ops.factory import build_optimizer
from deepspeed.ops.probe import is_elementwise, is_per_parameter
from deepspeed.zero.stage import Sharding


def choose_optimizer(
    module: nn.Module,
    settings: DeepSpeedConfig,
    client: torch.optim.Optimizer | Callable[..., torch.optim.Optimizer] | None,
    model_parameters: Iterable[Any] | None,
) -> torch.optim.Optimizer | None:
    """Return the user's optimizer, or the configured one over the user's parameters, or None.

    Without either nobody asks for `model_parameters`: Lightning gives an empty list to evaluate.
    """
    configured = None if settings.optimizer is None else settings.optimizer.type
    if client is None and configured is None:
        return None
    if isinstance(client, torch.optim.Optimizer):
        optimizer = client
    else:
        model_parameters = None if model_parameters is None else _listed(model_parameters)
        groups = param_groups(module, model_parameters)
        if client is not None:
            optimizer = _made_by(client, groups, in_groups=_are_groups(model_parameters))
        elif configured is not None and groups:
            optimizer = _configured(module, settings, configured, groups)
        else:
            return None
    _drop_frozen(optimizer)
    return optimizer


def _listed(model_parameters: Iterable[Any]) -> list[Any]:
    return [model_parameters] if isinstance(model_parameters, Tensor) else list(model_parameters)


def _are_groups(model_parameters: list[Any] | None) -> bool:
    return bool(model_parameters) and isinstance(model_parameters[0], dict)  # type: ignore[index]


def _made_by(
    make: Callable[..., Any], groups: list[dict[str, Any]], *, in_groups: bool
) -> torch.optim.Optimizer:
    """Call the user's callable with what the user gave: param groups, or the parameters themselves."""
    made = make(groups if in_groups else [param for group in groups for param in group["params"]])
    if not isinstance(made, torch.optim.Optimizer):
        raise ConfigError(
            f"optimizer: expected the callable to return a torch.optim.Optimizer, got {made!r}; "
            "it is called with the parameters to train"
        )
    return made


def _configured(
    module: nn.Module, settings: DeepSpeedConfig, type_name: str, groups: list[dict[str, Any]]
) -> torch.optim.Optimizer:
    section = settings.optimizer
    if type_name.lower() == "muon":
        mark_for_muon(module)
    optimizer = build_optimizer(type_name, dict(section.params or {}) if section else {}, groups)
    _narrow_states(optimizer, settings)
    return optimizer


def param_groups(module: nn.Module, model_parameters: Iterable[Any] | None) -> list[dict[str, Any]]:
    """Normalise parameters, named parameters or param groups to param groups of trainable parameters."""
    given = _listed(module.parameters() if model_parameters is None else model_parameters)
    if model_parameters is not None and not given:
        raise ConfigError(
            "model_parameters: expected parameters to train, got none; an iterator such as model.parameters() "
            "is empty once it has been used: pass a fresh one, or nothing for all that require grad"
        )
    if _are_groups(given):
        for group in given:
            if not isinstance(group, dict) or not isinstance(group.get("params"), Iterable):
                raise ConfigError(
                    f'model_parameters: expected param groups {{"params": [...], ...}}, got {group!r}'
                )
        return [{**group, "params": _trainable(group["params"])} for group in given]
    params = _trainable(given)
    return [{"params": params}] if params else []


def mark_for_muon(module: nn.Module) -> None:
    """Mark the hidden matrices, which Muon is for; embeddings and the output layer are not."""
    for name, param in module.named_parameters():
        if not hasattr(param, "use_muon"):
            hidden = not any(word in name.lower() for word in ("embed", "lm_head", "wte", "wpe"))
            param.use_muon = param.dim() >= 2 and hidden  # type: ignore[attr-defined]


def leaf_kind(optimizer: torch.optim.Optimizer, sharding: Sharding) -> Literal["flat", "whole"]:
    """Decide whether an optimizer may see flat runs of many parameters, or needs whole ones.

    Raises:
        ConfigError: its result depends on parameters that other ranks hold, or it evaluates the loss itself.
    """
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ConfigError(
            f"optimizer: {type(optimizer).__name__} evaluates the loss itself through a closure, but gradients "
            "come from engine.backward(loss); use an optimizer whose step needs no closure"
        )
    if is_elementwise(optimizer):
        return "flat"
    if is_per_parameter(optimizer) or sharding.shard_group.size == 1:
        return "whole"
    raise ConfigError(
        f"optimizer: {type(optimizer).__name__} mixes values of different parameters, which lie on different "
        "ranks at ZeRO stage 1 and above; use stage 0, or an optimizer that treats each parameter by itself"
    )


def _narrow_states(optimizer: torch.optim.Optimizer, settings: DeepSpeedConfig) -> None:
    if not settings.bf16.bf16_optimizer_states:
        return
    if not isinstance(optimizer, FusedAdam):
        raise ConfigError(
            f"bf16.bf16_optimizer_states: expected Adam or AdamW, got {type(optimizer).__name__}; turn it off"
        )
    optimizer.state_dtype = torch.bfloat16


def _trainable(params: Any) -> list[nn.Parameter]:
    listed: list[Any] = [params] if isinstance(params, Tensor) else list(params)
    unique: dict[int, Any] = {}
    for entry in listed:
        param = entry[1] if isinstance(entry, tuple) else entry
        if not isinstance(param, Tensor):
            raise ConfigError(
                f"model_parameters: expected tensors, (name, tensor) pairs or param groups, got {entry!r}"
            )
        if param.requires_grad:
            unique[id(param)] = param
    return list(unique.values())


def _drop_frozen(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        group["params"] = _trainable(group["params"])
