"""Arithmetic of a grid of ranks with named axes; no process group is made here.

ProcessTopology(["pipe", "data"], [2, 2])      the last axis varies fastest

         data 0   data 1
pipe 0   rank 0   rank 1
pipe 1   rank 2   rank 3
"""

from __future__ import annotations

import math
from collections import namedtuple
from collections.abc import Sequence
from typing import Any

from deepspeed.errors import ConfigError, UsageError


class ProcessTopology:
    """Ranks on a grid: coordinates by axis name to rank and back."""

    def __init__(self, axes: Sequence[str], dims: Sequence[int]) -> None:
        if len(axes) != len(dims) or len(set(axes)) != len(axes):
            raise ConfigError(
                f"axes: expected different names, one per size, got {list(axes)} and {list(dims)}"
            )
        if any(size < 1 for size in dims):
            raise ConfigError(f"dims: expected sizes of at least 1, got {list(dims)}")
        self.axes = list(axes)
        self.dims = list(dims)
        self.ProcessCoord: Any = namedtuple("ProcessCoord", self.axes)  # type: ignore[misc]

    def world_size(self) -> int:
        """Return the number of ranks."""
        return math.prod(self.dims)

    def get_axis_names(self) -> list[str]:
        """Return the axes, slowest first."""
        return self.axes

    def get_dim(self, axis: str) -> int:
        """Return the size of an axis; 0 for one that is not there."""
        return self.dims[self.axes.index(axis)] if axis in self.axes else 0

    def get_rank(self, **coords: int) -> int:
        """Return the rank at the given coordinates, one for every axis."""
        if set(coords) != set(self.axes):
            raise UsageError(f"get_rank: expected a coordinate for each of {self.axes}, got {sorted(coords)}")
        rank = 0
        for axis, size in zip(self.axes, self.dims, strict=True):
            if not 0 <= coords[axis] < size:
                raise UsageError(f"get_rank: expected {axis} from 0 to {size - 1}, got {coords[axis]}")
            rank = rank * size + coords[axis]
        return rank

    def get_coord(self, rank: int) -> Any:
        """Return the coordinates of `rank` as a named tuple with a field per axis."""
        if not 0 <= rank < self.world_size():
            raise UsageError(f"get_coord: expected a rank from 0 to {self.world_size() - 1}, got {rank}")
        coords: list[int] = []
        for size in reversed(self.dims):
            rank, coord = divmod(rank, size)
            coords.append(coord)
        return self.ProcessCoord(*reversed(coords))

    def filter_match(self, **coords: int) -> list[int]:
        """Return the ranks whose coordinates have all the given values, ascending."""
        return [
            rank
            for rank in range(self.world_size())
            if all(getattr(self.get_coord(rank), axis) == value for axis, value in coords.items())
        ]

    def get_axis_list(self, axis: str, index: int) -> list[int]:
        """Return the ranks with coordinate `index` on `axis`, ascending."""
        return self.filter_match(**{axis: index})

    def get_axis_comm_lists(self, axis: str) -> list[list[int]]:
        """Return the groups of ranks that differ only on `axis`; none for an axis that is not there."""
        if axis not in self.axes:
            return []
        others = [name for name in self.axes if name != axis]
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world_size()):
            coord = self.get_coord(rank)
            groups.setdefault(tuple(getattr(coord, name) for name in others), []).append(rank)
        return list(groups.values())

    def get_rank_repr(
        self,
        rank: int,
        omit_axes: Sequence[str] = ("data", "pipe"),
        inner_sep: str = "_",
        outer_sep: str = "-",
    ) -> str:
        """Return a rank's coordinates as text for file names: ``model_00-expert_01``."""
        coord = self.get_coord(rank)
        shown = [axis for axis in self.axes if axis not in omit_axes]
        return outer_sep.join(f"{axis}{inner_sep}{getattr(coord, axis):02d}" for axis in shown)

    def __str__(self) -> str:
        return f"ProcessTopology(axes={self.axes}, dims={self.dims})"


class PipeDataParallelTopology(ProcessTopology):
    """Pipe stages outside, data parallel ranks inside (neighbours reduce gradients)."""

    def __init__(self, num_pp: int, num_dp: int) -> None:
        super().__init__(["pipe", "data"], [num_pp, num_dp])


class PipeModelDataParallelTopology(ProcessTopology):
    """Pipe stages, then data parallel, then model parallel ranks innermost (they talk most)."""

    def __init__(self, num_pp: int, num_mp: int, num_dp: int) -> None:
        super().__init__(["pipe", "data", "model"], [num_pp, num_dp, num_mp])
