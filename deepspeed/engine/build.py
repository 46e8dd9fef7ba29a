"""From configuration to parts: the only place that reads it. Below here parts get values.

model + config -> policy, sharding -> inner optimizer -> units -> reducer -> ZeroOptimizer -> schedule
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from deepspeed import comm
from deepspeed.accelerator import get_accelerator
from deepspeed.accelerator.heap import keep_freed_memory
from deepspeed.comm.agreement import raise_together
from deepspeed.config import DeepSpeedConfig, resolve_scheduler
from deepspeed.config.batch import BatchSizes
from deepspeed.data import DeepSpeedDataLoader
from deepspeed.engine.feature import Feature
from deepspeed.engine.features import make_features
from deepspeed.engine.offload import home_of_states
from deepspeed.engine.optimizers import choose_optimizer
from deepspeed.engine.sharding import ShardedModule, choose_sharding, shard_module
from deepspeed.errors import ConfigError
from deepspeed.precision.loss_scaler import create_loss_scaler
from deepspeed.precision.policy import PrecisionPolicy, dtype_named, lowered_parameters
from deepspeed.schedules import build_scheduler
from deepspeed.zero.gatherer import Gatherer
from deepspeed.zero.optimizer import StepRules, ZeroOptimizer
from deepspeed.zero.reducer import Reducer
from deepspeed.zero.slot import slot_of
from deepspeed.zero.stage import RankGroup, Sharding
from deepspeed.zero.unit import Unit


@dataclass
class EngineParts:
    """Everything an engine is made of."""

    module: nn.Module
    settings: DeepSpeedConfig
    batch: BatchSizes
    policy: PrecisionPolicy
    sharding: Sharding
    data_parallel: RankGroup
    device: torch.device
    optimizer: ZeroOptimizer | None
    reducer: Reducer | None
    gatherer: Gatherer | None
    units: list[Unit]
    lr_scheduler: Any
    training_dataloader: Any
    make_loader: Callable[..., Any]
    features: list[Feature]
    mpu: Any


def build_parts(
    module: nn.Module,
    settings: DeepSpeedConfig,
    *,
    data_parallel: RankGroup,
    client_optimizer: torch.optim.Optimizer | Callable[..., torch.optim.Optimizer] | None,
    model_parameters: Iterable[Any] | None,
    client_scheduler: Any,
    training_data: Any,
    collate_fn: Callable[..., Any] | None,
    mpu: Any,
) -> EngineParts:
    """Build an engine's parts.

    Args:
        module: the model, anywhere, in any dtype; it is moved and cast in place.
        settings: the validated configuration.
        data_parallel: ranks that share the batch.
        client_optimizer: the user's optimizer instance, or a callable that makes one from parameters.
        model_parameters: tensors or param groups to train; None: all that require grad.
        client_scheduler: the user's schedule, or a callable that makes one from the optimizer.
        training_data: dataset for `training_dataloader`, or None.
        collate_fn: passed to the loader.
        mpu: the user's model-parallel unit; kept for callers.
    """
    device = torch.device(get_accelerator().current_device_name())
    policy = precision_policy(settings, module)
    sharding = choose_sharding(settings, data_parallel)
    inner = choose_optimizer(module, settings, client_optimizer, model_parameters)
    home = None if inner is None else home_of_states(settings, data_parallel, device)
    sharded = shard_module(module, inner, settings, policy, sharding, device, home)
    if sharded.states.are_away:
        raise_together(sharded.states.failure, data_parallel.process_group)
    optimizer = reducer = None
    if inner is not None:
        reducer, optimizer = _make_optimizer(inner, sharded, settings, policy, data_parallel, device)
    _place_rest(module, policy, data_parallel, device, dtype_of_buffers(settings))
    make_loader = partial(
        _make_loader, settings=settings, data_parallel=data_parallel, collate_fn=collate_fn, device=device
    )
    if isinstance(training_data, torch.utils.data.DataLoader):
        training_data = _dataset_of(training_data, settings)
    loader = None if training_data is None else make_loader(training_data, settings.batch.micro)
    if device.type == "cpu":
        keep_freed_memory()  # only now: what building took goes back to the system
    return EngineParts(
        module=module,
        settings=settings,
        batch=settings.batch,
        policy=policy,
        sharding=sharding,
        data_parallel=data_parallel,
        device=device,
        optimizer=optimizer,
        reducer=reducer,
        gatherer=sharded.gatherer,
        units=sharded.units,
        lr_scheduler=_schedule(settings, client_scheduler, optimizer),
        training_dataloader=loader,
        make_loader=make_loader,
        features=make_features(settings, data_parallel),
        mpu=mpu,
    )


def precision_policy(settings: DeepSpeedConfig, module: nn.Module) -> PrecisionPolicy:
    """Turn the precision sections into a policy."""
    fp16, bf16, autocast = settings.fp16, settings.bf16, settings.torch_autocast
    storage = torch.float16 if fp16.enabled else torch.bfloat16 if bf16.enabled else None
    low_master = (fp16.enabled and fp16.fp16_master_weights_and_grads) or (
        bf16.enabled and bf16.bf16_master_weights_and_grads
    )
    cast_dtype = dtype_named(autocast.dtype or "bf16") if autocast.enabled else None
    accumulate = settings.data_types.grad_accum_dtype
    reduce = settings.communication_data_type
    return PrecisionPolicy(
        storage=storage,
        autocast=cast_dtype,
        reduce=dtype_named(reduce) if reduce else None,
        accumulate=dtype_named(accumulate) if accumulate else (storage if low_master else None),
        master=storage if low_master else None,
        lowered=(
            lowered_parameters(module, autocast.lower_precision_safe_modules)
            if autocast.enabled
            else frozenset()
        ),
        loss_scaled=bool(fp16.enabled) or cast_dtype is torch.float16,
        cast_inputs=storage is not None and not _casting_refused(settings),
    )


def _casting_refused(settings: DeepSpeedConfig) -> bool:
    """Inputs are cast unless the user wrote ``fp16.auto_cast: false``."""
    fp16 = settings.fp16
    return fp16.enabled and not fp16.auto_cast and settings.source_of("fp16.auto_cast") == "user"


def dtype_of_buffers(settings: DeepSpeedConfig) -> torch.dtype | None:
    """The dtype floating-point buffers are cast to; None leaves them."""
    name = settings.data_types.buffer_dtype
    return dtype_named(name) if name else None


def _make_optimizer(
    inner: torch.optim.Optimizer,
    sharded: ShardedModule,
    settings: DeepSpeedConfig,
    policy: PrecisionPolicy,
    data_parallel: RankGroup,
    device: torch.device,
) -> tuple[Reducer, ZeroOptimizer]:
    zero = settings.zero_optimization
    mean = settings.gradient_allreduce_op.lower() == "mean"
    predivide = 1.0
    if mean:
        predivide = data_parallel.size if settings.prescale_gradients else settings.gradient_predivide_factor
    in_flight = 1 if zero.overlap_comm is False else 2
    reducer = Reducer(
        sharded.trained,
        device,
        landing_place=sharded.states.landing_place,
        predivide=predivide,
        in_flight=in_flight,
    )
    rules = StepRules(
        clip=settings.gradient_clipping,
        divide_by=(data_parallel.size if mean else 1) / predivide,
        check_finite=policy.loss_scaled
        or (bool(settings.bf16.enabled) and settings.bf16.check_grad_overflow),
        require_all=not zero.ignore_unused_parameters,
    )
    optimizer = ZeroOptimizer(
        inner,
        reducer,
        data_parallel=data_parallel,
        rules=rules,
        scaler=create_loss_scaler(settings.fp16, enabled=policy.loss_scaled),
        states=sharded.states,
        gatherer=sharded.gatherer,
    )
    return reducer, optimizer


def _place_rest(
    module: nn.Module,
    policy: PrecisionPolicy,
    data_parallel: RankGroup,
    device: torch.device,
    buffer_dtype: torch.dtype | None,
) -> None:
    """Move and cast what is in no unit (frozen parameters, buffers), and make it equal on all ranks."""
    rest: list[torch.Tensor] = []
    for param in module.parameters():
        if slot_of(param) is None:
            param.data = param.data.to(device=device, dtype=policy.of(param).storage)
            rest.append(param.data)
    for owner in module.modules():
        for name, buffer in owner.named_buffers(recurse=False):
            dtype = buffer_dtype if buffer_dtype is not None and buffer.is_floating_point() else buffer.dtype
            moved = buffer.to(device=device, dtype=dtype)
            if moved is not buffer:
                owner._buffers[name] = moved
            rest.append(moved)
    if data_parallel.size > 1:
        for tensor in rest:
            if tensor.numel() > 0:
                comm.broadcast(tensor, src=data_parallel.first_rank, group=data_parallel.process_group)


def _schedule(settings: DeepSpeedConfig, client: Any, optimizer: ZeroOptimizer | None) -> Any:
    """Take the user's schedule, or make the configured one; without an optimizer there is none."""
    if optimizer is None:
        return None
    if client is not None:
        made = client if hasattr(client, "step") else client(optimizer)
        if not hasattr(made, "step"):
            raise ConfigError(
                f"lr_scheduler: expected the callable to return a schedule with step(), got {made!r}; "
                "it is called with the optimizer"
            )
        return made
    if settings.scheduler is None or settings.scheduler.type is None:
        return None
    resolve_scheduler(settings, optimizer_lr=optimizer.param_groups[0].get("lr"))
    return build_scheduler(settings.scheduler.type, dict(settings.scheduler.params or {}), optimizer)


def _dataset_of(loader: torch.utils.data.DataLoader[Any], settings: DeepSpeedConfig) -> Any:
    """Take the dataset of a user's loader; its batch size is what an "auto" micro-batch becomes."""
    if settings.batch.micro is None and loader.batch_size is not None:
        settings.complete_batch(loader.batch_size, "batch size of the loader given as training_data")
        settings.announce_resolutions()
    return loader.dataset


def _make_loader(
    dataset: Any,
    batch_size: int | None,
    *,
    settings: DeepSpeedConfig,
    data_parallel: RankGroup,
    collate_fn: Callable[..., Any] | None,
    device: torch.device,
    pin_memory: bool = True,
    **options: Any,
) -> DeepSpeedDataLoader:
    if batch_size is None:
        raise ConfigError(
            'train_micro_batch_size_per_gpu: a data loader needs a number, and it is "auto" until the first '
            "batch; set it in the configuration"
        )
    return DeepSpeedDataLoader(
        dataset,
        batch_size,
        collate_fn=options.pop("collate_fn", None) or collate_fn,
        drop_last=settings.dataloader_drop_last,
        rank=data_parallel.rank,
        world_size=data_parallel.size,
        pin_memory=pin_memory and device.type != "cpu",
        **options,
    )
