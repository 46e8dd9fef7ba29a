"""`deepspeed.initialize`: every accepted form of its arguments, turned into an engine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from deepspeed import comm
from deepspeed.accelerator import get_accelerator
from deepspeed.activation_checkpointing import checkpointing
from deepspeed.comm.standstill import watch
from deepspeed.common.logging import log_dist
from deepspeed.config import load_config, resolve_from_model
from deepspeed.engine.arguments import check_arguments
from deepspeed.engine.build import build_parts
from deepspeed.engine.engine import DeepSpeedEngine
from deepspeed.engine.state import show_state
from deepspeed.engine.watch import OutputWatch
from deepspeed.errors import ConfigError
from deepspeed.parallel.groups import axes
from deepspeed.parallel.mesh import data_parallel_group
from deepspeed.version import __version__
from deepspeed.zero.slot import trained_slot
from deepspeed.zero.stage import RankGroup

Initialized = tuple[DeepSpeedEngine, Any, Any, Any]


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | Callable[..., torch.optim.Optimizer] | None = None,
    model_parameters: Iterable[Any] | None = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int = 29500,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable[..., Any] | None = None,
    config: str | os.PathLike[str] | dict[str, Any] | None = None,
    mesh_param: Any = None,
    config_params: str | os.PathLike[str] | dict[str, Any] | None = None,
) -> Initialized:
    """Wrap a model in an engine that trains it.

    Args:
        args: object or dict that may carry ``deepspeed_config`` (a path) and ``local_rank``.
        model: the module to train, on any device, in any dtype; it is moved and cast in place.
        optimizer: an optimizer instance, or a callable that makes one from param groups; None takes the
            configuration's ``optimizer`` section, and without one the engine only runs forward.
        model_parameters: parameters or param groups to train; None: all that require grad.
        training_data: dataset for the returned loader.
        lr_scheduler: a schedule, or a callable that makes one from the optimizer.
        distributed_port: port of the first rank where no launcher chose one.
        mpu: model-parallel unit with ``get_data_parallel_group()`` and so on.
        dist_init_required: False refuses to start torch.distributed; it must be running.
        collate_fn: passed to the loader.
        config: dict, path, or base64 string of the configuration.
        mesh_param: (data parallel size, sequence parallel size).
        config_params: older name of `config`.

    Returns:
        (engine, optimizer, loader, schedule); what was not asked for is None.

    Raises:
        ConfigError: an argument or a configuration key cannot be used; the message names it.
    """
    check_arguments(
        model=model,
        optimizer=optimizer,
        model_parameters=model_parameters,
        training_data=training_data,
        lr_scheduler=lr_scheduler,
        mpu=mpu,
        collate_fn=collate_fn,
        mesh_param=mesh_param,
    )
    assert model is not None  # checked just now
    source = config_source(args, config, config_params)
    _destroy_earlier(model)
    if dist_init_required is not False:
        comm.init_distributed(distributed_port=distributed_port, verbose=False)
    watch()
    _use_own_device()
    log_dist(f"DeepSpeed info: version={__version__}, git-hash=unknown, git-branch=unknown", ranks=[0])
    data_parallel = RankGroup.of(data_parallel_group(mpu=mpu, mesh=mesh_param))
    axes.mpu = mpu
    settings = load_config(
        source, world_size=data_parallel.size, bf16_supported=get_accelerator().is_bf16_supported()
    )
    resolve_from_model(
        settings,
        hidden_size=hidden_size(model),
        total_numel=sum(param.numel() for param in model.parameters()),
    )
    settings.announce_resolutions()
    if settings.activation_checkpointing.model_fields_set:
        checkpointing.configure_from(settings.activation_checkpointing, mpu)
    if settings.comms_logger.enabled:
        comm.configure(settings)
    engine = DeepSpeedEngine(
        build_parts(
            model,
            settings,
            data_parallel=data_parallel,
            client_optimizer=optimizer,
            model_parameters=model_parameters,
            client_scheduler=lr_scheduler,
            training_data=training_data,
            collate_fn=collate_fn,
            mpu=mpu,
        )
    )
    if settings.dump_state:
        show_state(engine)
    return engine, engine.optimizer, engine.training_dataloader, engine.lr_scheduler


def config_source(args: Any, config: Any, config_params: Any) -> Any:
    """Find the one configuration among the arguments."""
    from_args = (
        args.get("deepspeed_config") if isinstance(args, dict) else getattr(args, "deepspeed_config", None)
    )
    given = {
        name: value
        for name, value in (
            ("config", config),
            ("config_params", config_params),
            ("args.deepspeed_config", from_args),
        )
        if value is not None
    }
    if not given:
        raise ConfigError(
            "config: expected a dict, a path or a base64 string, got nothing; pass config=..., or "
            "--deepspeed_config FILE on the command line"
        )
    if len(given) > 1 and any(value is not config for value in given.values()):
        raise ConfigError(f"config: expected one source, got {' and '.join(given)}; pass only one of them")
    return next(iter(given.values()))


def hidden_size(model: nn.Module) -> int | None:
    """Width of a transformers-style model, from its config; None where it has none."""
    config = getattr(model, "config", None)
    for owner in (config, getattr(config, "text_config", None)):
        size = getattr(owner, "hidden_size", None) or max(getattr(owner, "hidden_sizes", None) or [0])
        if isinstance(size, int) and size > 0:
            return size
    return None


def _use_own_device() -> None:
    """Make this rank's device the current one, so that every allocation lands on it."""
    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu" and "LOCAL_RANK" in os.environ:
        accelerator.set_device(int(os.environ["LOCAL_RANK"]) % accelerator.device_count())


def _destroy_earlier(model: nn.Module) -> None:
    """Take an earlier engine off a module that is initialized again: two would both move its gradients."""
    watches = [hook.engine() for hook in model._forward_hooks.values() if isinstance(hook, OutputWatch)]
    params = {id(param) for param in model.parameters()}
    slots = [trained_slot(param) for param in model.parameters()]  # hooks may have been cleared
    optimizers = [
        optimizer
        for optimizer in {id(slot.optimizer): slot.optimizer for slot in slots if slot is not None}.values()
        if all(id(param) in params for unit in optimizer.units for param in unit.params)
    ]
    engines = [*watches, *(optimizer.owner() for optimizer in optimizers)]
    for engine in {id(one): one for one in engines if one is not None}.values():
        engine.destroy()
    for optimizer in optimizers:  # of engines that nobody holds any more
        optimizer.detach()
