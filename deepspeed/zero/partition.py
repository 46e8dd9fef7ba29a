"""Turn a model's parameters into units."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from deepspeed.precision.policy import PrecisionPolicy
from deepspeed.zero.grouping import NamedParameter, group_blocks, group_parameters
from deepspeed.zero.holder import Holder
from deepspeed.zero.layout import even_layout, whole_layout
from deepspeed.zero.meter import GatherMeter
from deepspeed.zero.stage import Sharding
from deepspeed.zero.states import LeafStates
from deepspeed.zero.unit import Unit

Kind = Callable[[nn.Parameter], Hashable]


@dataclass(frozen=True)
class UnitPlan:
    """How parameters are grouped and where they live.

    Attributes:
        sharding: groups of ranks.
        policy: number formats.
        device: where the units live.
        max_numel: most elements in a unit of whole parameters (one larger parameter is allowed).
        whole_parameters: keep every parameter inside one shard.
        persistent_below: parameters with fewer elements stay whole, where others are released.
        persistent_total: most elements that stay whole by that rule.
        live_numel: a block with more elements is gathered layer by layer.
        together: names of modules that are gathered as one.
    """

    sharding: Sharding
    policy: PrecisionPolicy
    device: torch.device
    max_numel: int
    whole_parameters: bool = False
    persistent_below: int = 0
    persistent_total: int = 0
    live_numel: int = 2**62
    together: Collection[str] = field(default=())


def make_units(
    named: Sequence[NamedParameter],
    plan: UnitPlan,
    *,
    group_index: dict[int, int],
    holder: Holder | None = None,
    meter: GatherMeter | None = None,
    states: LeafStates | None = None,
) -> list[Unit]:
    """Lay parameters out in units.

    Args:
        named: unique (name, parameter) pairs in registration order.
        plan: how.
        group_index: id(parameter) -> index of its param group, for those that are trained; a group's parameters
            lie together in a unit, so that few leaves cover a shard.
        holder: where shards live between uses; None: in memory.
        meter: counts gathers.
        states: takes the masters of some of the trained units to where they belong.

    Returns:
        Units in registration order of their first parameter, within those that stay whole and those that do not.
    """
    policy = plan.policy

    def kind(param: nn.Parameter) -> Hashable:
        return policy.of(param), id(param) in group_index

    units = []
    for sharding, members in _lists(named, plan, kind):
        members.sort(key=lambda pair: group_index.get(id(pair[1]), -1))
        layout = whole_layout if plan.whole_parameters else even_layout
        dtypes, trained = policy.of(members[0][1]), id(members[0][1]) in group_index
        numels = [param.numel() for _, param in members]
        away = states is not None and trained and states.takes(sum(numels))
        units.append(
            Unit(
                members,
                layout(numels, sharding.shard_group.size),
                sharding,
                dtypes,
                plan.device,
                trained=trained,
                master_on=states.device if states is not None and away else None,
                holder=holder,
                meter=meter,
            )
        )
        if states is not None and away:
            states.receive(units[-1])
    return units


def _lists(
    named: Sequence[NamedParameter], plan: UnitPlan, kind: Kind
) -> Iterator[tuple[Sharding, list[NamedParameter]]]:
    """Yield the lists that become units, with their sharding."""
    sharding = plan.sharding
    persistent = _persistent(named, plan) if sharding.releases else {id(param) for _, param in named}
    whole = [pair for pair in named if id(pair[1]) in persistent]
    rest = [pair for pair in named if id(pair[1]) not in persistent]
    # Whole parameters balance over ranks only when there are many of them: one unit for each kind.
    lists = _by_kind(whole, kind) if plan.whole_parameters else group_parameters(whole, kind, plan.max_numel)
    for members in lists:
        yield sharding.kept_whole() if sharding.releases else sharding, members
    for members in group_blocks(rest, kind, plan.together, plan.live_numel):
        yield sharding, members


def _persistent(named: Sequence[NamedParameter], plan: UnitPlan) -> set[int]:
    """Choose the parameters that stay whole: the small ones, as many as may be, the smallest first."""
    small = [param for _, param in named if param.numel() < plan.persistent_below]
    chosen, total = set(), 0
    for param in sorted(small, key=lambda one: one.numel()):
        total += param.numel()
        if total > plan.persistent_total:
            break
        chosen.add(id(param))
    return chosen


def _by_kind(named: Sequence[NamedParameter], kind: Kind) -> list[list[NamedParameter]]:
    kinds: dict[object, list[NamedParameter]] = {}
    for pair in named:
        kinds.setdefault(kind(pair[1]), []).append(pair)
    return list(kinds.values())
