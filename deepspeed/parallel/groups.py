"""The groups of a run: those of the user's model-parallel unit, or all ranks as data parallel.

Without a model-parallel unit, or where it does not know an axis, that axis is this rank alone.
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
            return self._group_of("data_parallel")
        return dist.group.WORLD if dist.is_initialized() else None

    def data_parallel_world_size(self) -> int:
        """Return their number."""
        return _size(self.data_parallel_group())

    def data_parallel_rank(self) -> int:
        """Return this rank's place among them."""
        return _rank(self.data_parallel_group())

    def model_parallel_group(self) -> dist.ProcessGroup | None:
        """Return the ranks that share one copy of the model; None where it is this rank alone."""
        return self._group_of("model_parallel", "tensor_model_parallel")

    def model_parallel_world_size(self) -> int:
        """Return their number."""
        return _size(self.model_parallel_group())

    def model_parallel_rank(self) -> int:
        """Return this rank's place among them."""
        return _rank(self.model_parallel_group())

    def tensor_model_parallel_group(self) -> dist.ProcessGroup | None:
        """Return the ranks that share each layer; None where it is this rank alone."""
        return self._group_of("tensor_model_parallel", "model_parallel")

    def tensor_model_parallel_world_size(self) -> int:
        """Return their number."""
        return _size(self.tensor_model_parallel_group())

    def tensor_model_parallel_rank(self) -> int:
        """Return this rank's place among them."""
        return _rank(self.tensor_model_parallel_group())

    def sequence_parallel_group(self) -> dist.ProcessGroup | None:
        """Return the ranks that share a sequence; None where it is this rank alone."""
        return self._group_of("sequence_parallel")

    def sequence_parallel_world_size(self) -> int:
        """Return their number."""
        return _size(self.sequence_parallel_group())

    def sequence_parallel_rank(self) -> int:
        """Return this rank's place among them."""
        return _rank(self.sequence_parallel_group())

    def _group_of(self, *names: str) -> dist.ProcessGroup | None:
        """Ask the unit for the first of these axes that it knows."""
        for name in names:
            ask = getattr(self.mpu, f"get_{name}_group", None)
            if ask is not None:
                return cast("dist.ProcessGroup | None", ask())
        return None


axes = Axes()
"""Of the last engine made: the default mesh."""


def _size(group: dist.ProcessGroup | None) -> int:
    return 1 if group is None else dist.get_world_size(group)


def _rank(group: dist.ProcessGroup | None) -> int:
    return 0 if group is None else dist.get_rank(group)
