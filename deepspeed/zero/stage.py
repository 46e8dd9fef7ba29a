"""What a ZeRO stage means: which ranks share what, and when gradients travel.

    stage   shard group   hold group   parameters between uses   gradients reduced        master + moments
    0       {me}          {me}         whole                     accumulation boundary    whole
    1       all dp        {me}         whole                     accumulation boundary*   my shard
    2       all dp        {me}         whole                     every backward           my shard
    3       all dp        all dp       my shard                  every backward           my shard
    hpZ     all dp        neighbours   my part of their whole    every backward           my shard
    MiCS    neighbours    neighbours   my shard                  every backward           my shard

* Every backward where ranks share memory: sending takes no longer there than adding up, and a rank keeps the sums of
its shard instead of all.

Sources: ZeRO (arXiv 1910.02054); MiCS (arXiv 2205.00119); hpZ is part of ZeRO++ (arXiv 2306.10209).
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist

from deepspeed.errors import ConfigError


@dataclass(frozen=True)
class RankGroup:
    """Ranks that communicate; a group of one has no process group and never communicates."""

    rank: int = 0
    size: int = 1
    process_group: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, process_group: dist.ProcessGroup | None) -> RankGroup:
        """Describe `process_group` (None: the default group) as seen from this rank."""
        if not dist.is_initialized():
            return cls()
        return cls(dist.get_rank(process_group), dist.get_world_size(process_group), process_group)

    @property
    def members(self) -> list[int]:
        """Global ranks, in their order in the group."""
        if not dist.is_initialized() or self.size == 1:
            return [dist.get_rank()] if dist.is_initialized() else [0]
        return dist.get_process_group_ranks(self.process_group or dist.group.WORLD)

    @property
    def first_rank(self) -> int:
        """Global rank of the group's first member."""
        group = self.process_group
        return 0 if group is None else dist.get_global_rank(group, 0)


@dataclass(frozen=True)
class Sharding:
    """Where shards and parameters live, and when gradients travel.

    A gradient is reduce-scattered over `shard_group`, then all-reduced over `replica_group`. Parameters are
    kept split over `hold_group`: gathering them is an all-gather there, and an updated shard is spread over
    `spread_group`, the ranks that keep a copy of it. `everyone` is all data-parallel ranks. The members of a
    hold group are neighbours in the shard group: ``spread rank * hold size + hold rank`` is the shard rank.

    A group of one communicates nothing, and that is all that distinguishes the stages.
    """

    shard_group: RankGroup
    replica_group: RankGroup
    hold_group: RankGroup
    spread_group: RankGroup
    everyone: RankGroup
    reduce_every_backward: bool
    marks_parameters: bool = False
    """Whether parameters carry ``ds_id``, ``ds_shape`` and so on, which scripts ask for at stage 3."""
    away: bool = False
    """Whether parameters leave the device between uses."""

    @property
    def releases(self) -> bool:
        """Whether the memory of whole parameters is given back between uses."""
        return self.hold_group.size > 1 or self.away

    def kept_whole(self) -> Sharding:
        """Return the same sharding of gradients and masters, with parameters whole at all times."""
        return replace(self, hold_group=RankGroup(), spread_group=self.shard_group, away=False)


def sharding_for_stage(
    stage: int,
    data_parallel: RankGroup,
    *,
    mics_size: int = -1,
    hpz_size: int = 1,
    away: bool = False,
    near: bool = False,
) -> Sharding:
    """Turn a stage (0 to 3) into its meaning over the data-parallel ranks.

    Args:
        stage: of ZeRO.
        data_parallel: ranks that share the batch.
        mics_size: ranks that share one copy of everything (stage 3); below 1: all.
        hpz_size: ranks that share one copy of the parameters (stage 3); 1: all.
        away: whether parameters leave the device between uses (stage 3).
        near: whether the data-parallel ranks share memory.

    Raises:
        ConfigError: a size that does not divide the number of ranks, or both at once.
    """
    me, world = RankGroup(), data_parallel
    if stage == 0:
        return Sharding(me, world, me, me, world, reduce_every_backward=False)
    if stage < 3:
        return Sharding(world, me, me, world, world, reduce_every_backward=stage == 2 or near)
    if mics_size > 0 and hpz_size > 1:
        raise ConfigError(
            f"zero_optimization.zero_hpz_partition_size: expected 1 beside mics_shard_size {mics_size}, got "
            f"{hpz_size}; both choose the ranks that share a copy of the parameters, so set one of them"
        )
    if away and hpz_size > 1:
        raise ConfigError(
            f"zero_optimization.zero_hpz_partition_size: expected 1 with offload_param, got {hpz_size}; hpZ keeps "
            "another copy of the parameters in memory and offload_param takes them out of it, so set one of them"
        )
    shard, replica, hold, spread = world, me, world, me
    if mics_size > 0:
        shard, replica = _split(world, mics_size, "zero_optimization.mics_shard_size")
        hold = shard
    elif hpz_size > 1:
        hold, spread = _split(world, hpz_size, "zero_optimization.zero_hpz_partition_size")
    return Sharding(
        shard, replica, hold, spread, world, reduce_every_backward=True, marks_parameters=True, away=away
    )


def _split(ranks: RankGroup, size: int, key: str) -> tuple[RankGroup, RankGroup]:
    """Cut ranks into rows of `size` neighbours; return this rank's row and column."""
    if ranks.size % size != 0:
        fitting = [one for one in range(1, ranks.size + 1) if ranks.size % one == 0]
        raise ConfigError(
            f"{key}: expected a divisor of the {ranks.size} data-parallel ranks, got {size}; "
            f"use one of {', '.join(map(str, fitting))}"
        )
    if size == ranks.size:
        return ranks, RankGroup()
    members = ranks.members
    row = members[ranks.rank // size * size :][:size]
    column = members[ranks.rank % size :: size]
    return _group_of(row), _group_of(column)


_GROUPS: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[tuple[int, ...], dist.ProcessGroup]] = (
    weakref.WeakKeyDictionary()
)
"""Groups that were made under a world group: engines made one after the other share them."""


def _group_of(members: list[int]) -> RankGroup:
    """Return the group of some global ranks; only they call."""
    if len(members) == 1:
        return RankGroup()
    world: Any = dist.group.WORLD
    known = _GROUPS.setdefault(world, {})
    key = tuple(members)
    if key not in known:
        known[key] = dist.new_group(members, use_local_synchronization=True)
    return RankGroup.of(known[key])
