"""Turn a model's parameters into units."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deepspeed.precision.policy import PrecisionPolicy
from deepspeed.zero.grouping import NamedParameter, group_parameters
from deepspeed.zero.layout import even_layout, whole_layout
from deepspeed.zero.stage import Sharding
from deepspeed.zero.unit import Unit


def make_units(
    named: Sequence[NamedParameter],
    sharding: Sharding,
    policy: PrecisionPolicy,
    *,
    group_index: dict[int, int],
    whole_parameters: bool,
    max_numel: int,
    device: torch.device,
) -> list[Unit]:
    """Lay the trainable parameters out in units.

    Args:
        named: unique (name, parameter) pairs in registration order.
        sharding: groups of ranks.
        policy: number formats.
        group_index: id(parameter) -> index of its param group; a group's parameters lie together in a unit,
            so that few leaves cover a shard.
        whole_parameters: keep every parameter inside one shard. There is then one unit for each kind of
            parameter, because whole parameters balance over ranks only when there are many of them.
        max_numel: most elements in a unit otherwise (one larger parameter is allowed).
        device: where the units live.
    """
    layout = whole_layout if whole_parameters else even_layout
    if whole_parameters:
        members = _by_dtypes(named, policy)
    else:
        members = group_parameters(named, policy.of, max_numel)
    units = []
    for unit in members:
        unit.sort(key=lambda pair: group_index[id(pair[1])])
        numels = [param.numel() for _, param in unit]
        dtypes = policy.of(unit[0][1])
        units.append(Unit(unit, layout(numels, sharding.shard_group.size), sharding, dtypes, device))
    return units


def _by_dtypes(named: Sequence[NamedParameter], policy: PrecisionPolicy) -> list[list[NamedParameter]]:
    kinds: dict[object, list[NamedParameter]] = {}
    for pair in named:
        kinds.setdefault(policy.of(pair[1]), []).append(pair)
    return list(kinds.values())
