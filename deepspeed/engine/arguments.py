"""What `deepspeed.initialize` may be given: checked before anything is touched, each argument by name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from deepspeed.errors import ConfigError


def check_arguments(
    *,
    model: Any,
    optimizer: Any,
    model_parameters: Any,
    training_data: Any,
    lr_scheduler: Any,
    mpu: Any,
    collate_fn: Any,
    mesh_param: Any,
) -> None:
    """Raise ConfigError for an argument of a kind that cannot be used."""
    _expect("model", model, isinstance(model, nn.Module), "a torch.nn.Module")
    _expect(
        "optimizer",
        optimizer,
        optimizer is None or isinstance(optimizer, torch.optim.Optimizer) or callable(optimizer),
        "a torch.optim.Optimizer or a callable that makes one; a name belongs in the configuration's "
        '"optimizer" section',
    )
    _expect(
        "model_parameters",
        model_parameters,
        model_parameters is None or isinstance(model_parameters, Iterable),
        "parameters or param groups",
    )
    _expect(
        "training_data",
        training_data,
        training_data is None or hasattr(training_data, "__getitem__") or hasattr(training_data, "__iter__"),
        "a dataset",
    )
    _expect(
        "lr_scheduler",
        lr_scheduler,
        lr_scheduler is None or hasattr(lr_scheduler, "step") or callable(lr_scheduler),
        "a schedule with step(), or a callable that makes one",
    )
    _expect(
        "mpu",
        mpu,
        mpu is None or hasattr(mpu, "get_data_parallel_group"),
        "a model-parallel unit with get_data_parallel_group()",
    )
    _expect("collate_fn", collate_fn, collate_fn is None or callable(collate_fn), "a callable")
    _expect(
        "mesh_param",
        mesh_param,
        mesh_param is None or isinstance(mesh_param, (tuple, list, torch.distributed.device_mesh.DeviceMesh)),
        "a DeviceMesh or (data parallel size, sequence parallel size)",
    )


def _expect(name: str, value: Any, good: bool, expected: str) -> None:
    if not good:
        raise ConfigError(f"{name}: expected {expected}, got {type(value).__name__} {value!r}")
