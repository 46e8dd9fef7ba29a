"""Where the values of an original's checkpoint lie: ranges of its flat tensors, by parameter name.

stages 1, 2   each group is one flat, cut into equal partitions; every rank's file tells its cuts by name:
              rank 0  [ a ......... | b .... ]      rank 1  [ .... b | c ............ | padding ]
stage 3       every parameter is cut into equal chunks, the last one padded; a rank has its chunks back to back
              in the order of the names, in flats that end anywhere:
              rank 0  [ a0 | b0 ][ c0 ]             rank 1  [ a1 | b1 ][ c1 ]
stage 0       nothing is cut, and nothing tells names (see `original_whole`)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepspeed.checkpoint.manifest import MASTER, STATE, Place, Value, Values
from deepspeed.errors import CheckpointError

Shapes = dict[str, torch.Size]


@dataclass(frozen=True)
class Cut:
    """A range of a parameter in a flat: elements from `start` on, at `place` of the flat."""

    name: str
    start: int
    place: int
    numel: int


@dataclass
class Ranges:
    """Values and the tensors that their ranges are.

    Attributes:
        values: as the manifest has them; the record of a place is an index of `tensors`.
        scalars: states that are numbers, by parameter name: key -> [dtype or None, value].
    """

    shapes: Shapes
    values: Values = field(default_factory=dict)
    scalars: dict[str, dict[str, Any]] = field(default_factory=dict)
    tensors: list[Tensor] = field(default_factory=list)

    def add(self, kind: str, name: str, shape: Iterable[int], start: int, part: Tensor) -> None:
        """Take a range of a value that looks like `shape` when it is whole."""
        named = self.values.setdefault(kind, {})
        if name not in named:
            named[name] = Value(dtype_name(part.dtype), list(shape))
        named[name].places.append(Place(0, len(self.tensors), start, part.numel()))
        self.tensors.append(part.detach().reshape(-1))

    def add_flat(self, path: Path, flat: Tensor, states: dict[str, Any], cuts: list[Cut]) -> None:
        """Take the masters in a flat, and states of the same layout.

        Args:
            path: of their file, for errors.
            flat: fp32 masters.
            states: the optimizer's of it.
            cuts: what lies where.
        """
        for cut in cuts:
            self._cut(path, MASTER, cut, flat)
            for key, value in states.items():
                if isinstance(value, Tensor) and value.dim() > 0:
                    self._cut(path, STATE + key, cut, value)
                else:
                    self.add_number(cut.name, key, value)

    def add_states(self, name: str, states: dict[str, Any]) -> None:
        """Take the states of a parameter that are not cut, whatever their shapes."""
        for key, value in states.items():
            if isinstance(value, Tensor) and key != "step":
                self.add(STATE + key, name, value.shape, 0, value)
            else:
                self.add_number(name, key, value)

    def add_number(self, name: str, key: str, value: Any) -> None:
        """Take a state that is a number; optimizers count steps in fp32."""
        dtype = dtype_name(value.dtype) if isinstance(value, Tensor) else None
        number = value.item() if isinstance(value, Tensor) else value
        self.scalars.setdefault(name, {})[key] = ["float32" if key == "step" else dtype, number]

    def _cut(self, path: Path, kind: str, cut: Cut, flat: Tensor) -> None:
        stop = cut.place + cut.numel
        if flat.numel() < stop:
            raise CheckpointError(
                f"{path}: {kind} of {cut.name}: expected a flat of at least {stop} elements, got {flat.numel()}; its "
                "files are of several checkpoints"
            )
        self.add(kind, cut.name, self.shapes[cut.name], cut.start, flat.reshape(-1)[cut.place : stop])


def read_partitions(ranges: Ranges, path: Path, states: dict[str, Any], reached: dict[str, int]) -> None:
    """Take what one rank's file has at stages 1 and 2.

    Args:
        ranges: to add to.
        path: of the file.
        states: its ``optimizer_state_dict``.
        reached: elements of each parameter that the ranks before have; updated.
    """
    inner = states["base_optimizer_state"]
    for index, flat in enumerate(states["single_partition_of_fp32_groups"]):
        cuts = []
        for name, address in states["param_slice_mappings"][index].items():
            start = reached.get(name, 0)
            cuts.append(Cut(name, start, address.state["start"], address.state["numel"]))
            reached[name] = start + address.state["numel"]
        ranges.add_flat(path, flat, state_of(inner, index), cuts)


def read_chunks(ranges: Ranges, path: Path, states: dict[str, Any], names: Iterable[str], rank: Part) -> None:
    """Take what one rank's file has at stage 3.

    Args:
        ranges: to add to.
        path: of the file.
        states: its ``optimizer_state_dict``.
        names: of the trained parameters, in their order.
        rank: whose file it is.
    """
    flats = states["fp32_flat_groups"]
    cuts = _through(flats, _chunks(ranges.shapes, names, rank), path)
    for index, (flat, in_flat) in enumerate(zip(flats, cuts, strict=True)):
        ranges.add_flat(path, flat, state_of(states["optimizer_state_dict"], index), in_flat)


@dataclass(frozen=True)
class Part:
    """One of several equal parts."""

    index: int
    count: int

    def of(self, numel: int) -> tuple[int, int, int]:
        """Return start and size of this part of `numel` elements, and the size with padding."""
        chunk = -(-numel // self.count)
        start = min(self.index * chunk, numel)
        return start, min(chunk, numel - start), chunk


def _chunks(shapes: Shapes, names: Iterable[str], rank: Part) -> Iterator[tuple[str, int, int, int]]:
    for name in names:
        yield (name, *rank.of(shapes[name].numel()))


def _through(flats: list[Tensor], chunks: Iterator[tuple[str, int, int, int]], path: Path) -> list[list[Cut]]:
    """Lay chunks back to back through flats."""
    cuts: list[list[Cut]] = [[] for _ in flats]
    flat = place = 0
    for name, start, numel, padded in chunks:
        left = padded
        while left > 0:
            while flat < len(flats) and place == flats[flat].numel():
                flat, place = flat + 1, 0
            if flat == len(flats):
                raise CheckpointError(
                    f"{path}: expected the chunk of {name} too, but its values end before it; its files are of several "
                    "checkpoints"
                )
            here = min(left, flats[flat].numel() - place)
            done = padded - left
            real = max(0, min(here, numel - done))
            if real:
                cuts[flat].append(Cut(name, start + done, place, real))
            left, place = left - here, place + here
    return cuts


def state_of(inner: dict[str, Any] | list[dict[str, Any]], index: int) -> dict[str, Any]:
    """Return the optimizer's states of the tensor with an index."""
    if isinstance(inner, list):  # written with checkpoint.elastic
        found: dict[str, Any] = inner[index]
        return found
    found = dict(inner["state"].get(index, {}))
    groups = [group for group in inner["param_groups"] if index in group["params"]]
    if "step" in found or not groups or "step" not in groups[0]:
        return found
    return {**found, "step": groups[0]["step"]}


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name that manifests have for a dtype."""
    return str(dtype).removeprefix("torch.")
