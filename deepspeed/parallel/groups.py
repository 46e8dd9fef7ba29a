"""The groups of a run: those of the user's model-parallel unit, or all ranks as data parallel.

Without a model-parallel unit every axis but the data-parallel one is this rank alone.
"""

from __future__ import annotations

from typing import Any, cast

import torch.distributed as dist


class Axes:
    """Answers about the axes of ranks; `mpu` is the unit that `deepspeed.initialize` got last, if any."""

    def __init__(self) -> None:
        self.mpu: Any = None

    def data_parallel_group(self) -> dist.ProcessGroup | None:
        """Return the ranks with the same weights; None before torch.distributed runs."""
        if self.mpu is not None:
            return cast("dist.ProcessGroup | None", self.mpu.get_data_parallel_group())
        return dist.group.WORLD if dist.is_initialized() else None

    def data_parallel_world_size(self) -> int:
        """Return their number."""
        return dist.get_world_size(self.data_parallel_group()) if dist.is_initialized() else 1

    def data_parallel_rank(self) -> int:
        """Return this rank's place among them."""
        return dist.get_rank(self.data_parallel_group()) if dist.is_initialized() else 0

    def model_parallel_group(self) -> dist.ProcessGroup | None:
        """Return the ranks that share one copy of the model; None where it is this rank alone."""
        if self.mpu is None:
            return None
        return cast("dist.ProcessGroup | None", self.mpu.get_model_parallel_group())

    def model_parallel_world_size(self) -> int:
        """Return their number."""
        return 1 if self.mpu is None else dist.get_world_size(self.model_parallel_group())

    def model_parallel_rank(self) -> int:
        """Return this rank's place among them."""
        return 0 if self.mpu is None else dist.get_rank(self.model_parallel_group())


axes = Axes()
"""Of the last engine made: the default mesh."""


def alone_group() -> None:
    """Return None: an axis of size 1 has no group."""


def alone_size() -> int:
    """Return the size of an axis that is not used."""
    return 1


def alone_rank() -> int:
    """Return this rank's place on an axis that is not used."""
    return 0
