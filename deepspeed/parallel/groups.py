"""The groups of a run with one axis: all ranks are data parallel, every other axis is this rank alone."""

from __future__ import annotations

import torch.distributed as dist


def all_ranks_group() -> dist.ProcessGroup | None:
    """Return the group of all ranks; None before torch.distributed runs."""
    return dist.group.WORLD if dist.is_initialized() else None


def all_ranks_size() -> int:
    """Return the number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_ranks_rank() -> int:
    """Return this rank among all."""
    return dist.get_rank() if dist.is_initialized() else 0


def alone_group() -> None:
    """Return None: an axis of size 1 has no group."""


def alone_size() -> int:
    """Return the size of an axis that is not used."""
    return 1


def alone_rank() -> int:
    """Return this rank's place on an axis that is not used."""
    return 0
