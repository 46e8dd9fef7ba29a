"""From a model and its configuration to units, and the gatherer that brings them in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from deepspeed.accelerator import get_accelerator
from deepspeed.comm.direct import is_on_host
from deepspeed.comm.neighbours import links_of
from deepspeed.config import DeepSpeedConfig
from deepspeed.engine.optimizers import leaf_kind
from deepspeed.errors import ConfigError
from deepspeed.precision.policy import PrecisionPolicy
from deepspeed.zero.gatherer import Gatherer, GatherLimits
from deepspeed.zero.grouping import NamedParameter
from deepspeed.zero.holder import leave_device, make_holder
from deepspeed.zero.leaf_modules import modules_together
from deepspeed.zero.meter import GatherMeter
from deepspeed.zero.partition import UnitPlan, make_units
from deepspeed.zero.slot import slot_of, trained_slot
from deepspeed.zero.stage import RankGroup, Sharding, sharding_for_stage
from deepspeed.zero.states import TILE, LeafStates, StateHome
from deepspeed.zero.unit import Unit


@dataclass(frozen=True)
class ShardedModule:
    """A module whose parameters lie in units.

    Attributes:
        units: all of them.
        trained: those that the optimizer updates.
        states: where the optimizer's states of them will be.
        gatherer: brings in what is released between uses; None where nothing is.
    """

    units: list[Unit]
    trained: list[Unit]
    states: LeafStates
    gatherer: Gatherer | None


def choose_sharding(settings: DeepSpeedConfig, data_parallel: RankGroup) -> Sharding:
    """Turn the stage, MiCS and hpZ keys into groups of ranks."""
    zero = settings.zero_optimization
    device = torch.device(get_accelerator().current_device_name())
    return sharding_for_stage(
        int(zero.stage),
        data_parallel,
        away=leave_device(zero.offload_param, device),
        near=_share_memory(data_parallel, device),
        mics_size=zero.mics_shard_size,
        hpz_size=zero.zero_hpz_partition_size,
    )


def _share_memory(ranks: RankGroup, device: torch.device) -> bool:
    """Tell whether tensors on `device` go from rank to rank through memory; a collective."""
    group = ranks.process_group
    return ranks.size > 1 and device.type == "cpu" and is_on_host(group) and links_of(group) is not None


def shard_module(
    module: nn.Module,
    inner: torch.optim.Optimizer | None,
    settings: DeepSpeedConfig,
    policy: PrecisionPolicy,
    sharding: Sharding,
    device: torch.device,
    home: StateHome | None = None,
) -> ShardedModule:
    """Lay the parameters out: the trained ones, and at stage 3 or after ``zero.Init`` the others too."""
    groups = [] if inner is None else inner.param_groups
    group_index = {id(param): index for index, group in enumerate(groups) for param in group["params"]}
    named = list(module.named_parameters())
    trained = [pair for pair in named if id(pair[1]) in group_index]
    if inner is not None:
        _check_all_named(inner, trained)
    _check_present(named)
    _check_real(named if sharding.marks_parameters else trained)
    whole_parameters = inner is not None and leaf_kind(inner, sharding) == "whole"
    meter = GatherMeter()
    states = LeafStates(
        home,
        whole_parameters=whole_parameters,
        tile=min(TILE, settings.zero_optimization.sub_group_size or TILE),
    )
    units = make_units(
        [pair for pair in named if id(pair[1]) in group_index or _is_laid_out(pair[1], sharding)],
        _plan(module, settings, policy, sharding, device, whole_parameters),
        group_index=group_index,
        holder=make_holder(sharding, device, settings.zero_optimization.offload_param, settings.aio),
        meter=meter,
        states=states,
    )
    gatherer = None
    if sharding.marks_parameters:
        gatherer = Gatherer(module, units, _limits(settings), meter)
    updated = [unit for unit in units if id(unit.params[0]) in group_index]
    return ShardedModule(units, updated, states, gatherer)


def _is_laid_out(param: nn.Parameter, sharding: Sharding) -> bool:
    return sharding.marks_parameters or slot_of(param) is not None


def _plan(
    module: nn.Module,
    settings: DeepSpeedConfig,
    policy: PrecisionPolicy,
    sharding: Sharding,
    device: torch.device,
    whole_parameters: bool,
) -> UnitPlan:
    zero = settings.zero_optimization
    return UnitPlan(
        sharding=sharding,
        policy=policy,
        device=device,
        max_numel=min(zero.reduce_bucket_size, zero.allgather_bucket_size),
        whole_parameters=whole_parameters,
        persistent_below=zero.stage3_param_persistence_threshold,
        persistent_total=zero.stage3_model_persistence_threshold,
        live_numel=zero.stage3_max_live_parameters,
        together=modules_together(
            module, zero.leaf_module, granularity=zero.stage3_module_granularity_threshold
        ),
    )


def _limits(settings: DeepSpeedConfig) -> GatherLimits:
    zero = settings.zero_optimization
    return GatherLimits(
        live=zero.stage3_max_live_parameters,
        reuse=zero.stage3_max_reuse_distance,
        prefetch=0 if zero.overlap_comm is False else zero.stage3_prefetch_bucket_size,
    )


def _check_all_named(inner: torch.optim.Optimizer, named: list[tuple[str, nn.Parameter]]) -> None:
    known = {id(param) for _, param in named}
    for index, group in enumerate(inner.param_groups):
        for param in group["params"]:
            if id(param) not in known:
                raise ConfigError(
                    f"optimizer: expected parameters of the model, got a tensor of shape {tuple(param.shape)} "
                    f"in param group {index} that the model does not have; build the optimizer after the model"
                )


def _check_present(named: list[NamedParameter]) -> None:
    for name, param in named:
        if param.is_meta:
            raise ConfigError(
                f"{name}: expected a parameter with values, got one on the meta device; construct the model under "
                "deepspeed.zero.Init, or give it values (to_empty and load_state_dict) before initialize"
            )
        slot = trained_slot(param)
        if slot is not None:
            raise ConfigError(
                f"{name}: expected a parameter that no engine trains, got one of another engine; a parameter "
                "belongs to one engine: destroy() that one first, or copy the module"
            )


def _check_real(named: list[tuple[str, nn.Parameter]]) -> None:
    for name, param in named:
        if param.is_complex():
            raise ConfigError(
                f"{name}: expected a real parameter, got {param.dtype}; keep its real and imaginary parts "
                "(torch.view_as_real) as the parameter"
            )
