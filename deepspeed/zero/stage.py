"""What a ZeRO stage means: three booleans and two groups of ranks.

    stage   shard group   parameters   gradients reduced        master + optimizer state
    0       {me}          whole        accumulation boundary    whole
    1       all dp        whole        accumulation boundary    my shard
    2       all dp        whole        every backward           my shard

Source: ZeRO: Memory Optimizations Toward Training Trillion Parameter Models (arXiv 1910.02054).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist


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
    def first_rank(self) -> int:
        """Global rank of the group's first member."""
        group = self.process_group
        return 0 if group is None else dist.get_global_rank(group, 0)


@dataclass(frozen=True)
class Sharding:
    """Where shards live and when gradients travel.

    A gradient is reduce-scattered over `shard_group`, then all-reduced over `replica_group`.
    Stage 0 is a shard group of one; nothing else distinguishes it.
    """

    shard_group: RankGroup
    replica_group: RankGroup
    reduce_every_backward: bool

    @property
    def ranks(self) -> int:
        """Number of data-parallel ranks."""
        return self.shard_group.size * self.replica_group.size


def sharding_for_stage(stage: int, data_parallel: RankGroup) -> Sharding:
    """Turn a stage (0, 1 or 2) into its meaning over the data-parallel ranks."""
    if stage == 0:
        return Sharding(RankGroup(), data_parallel, reduce_every_backward=False)
    return Sharding(data_parallel, RankGroup(), reduce_every_backward=stage >= 2)
