"""What one rank writes of a model and its optimizer: which ranges of which values, planned first, written then.

    kept whole       weights by the first rank, masters and states by whoever owns the shard
    sharded          the rank's shard of each
    several copies   (stage 0, MiCS) the first of the ranks that have the same shard

Values are named by the parameter they belong to, and cut where the parameter is cut: nothing of the layout in units
and flats is in a file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from deepspeed.checkpoint.manifest import MASTER, STATE, WEIGHT, Place, Value, Values
from deepspeed.checkpoint.plain import to_plain
from deepspeed.checkpoint.records import RecordWriter, Room
from deepspeed.errors import UsageError
from deepspeed.version import __version__
from deepspeed.zero.leaves import Leaf
from deepspeed.zero.optimizer import ZeroOptimizer
from deepspeed.zero.slot import slot_of
from deepspeed.zero.unit import Unit


@dataclass
class Part:
    """A range of a value that goes to a room."""

    room: Room
    shape: list[int]  # of the whole value
    start: int
    numel: int


Parts = dict[str, dict[str, Part]]
"""By kind and name."""


@dataclass
class Source:
    """Where the values of a room come from: `read` gives them, elements of the whole from `start` on."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    read: Callable[[], Tensor]


@dataclass
class Weights:
    """The weights and buffers that this rank writes.

    Attributes:
        module: the state dict as the file has it: rooms, and what is no tensor.
        parts: of them.
    """

    module: dict[str, Any] = field(default_factory=dict)
    parts: Parts = field(default_factory=dict)
    _sources: list[tuple[Room, Callable[[], Tensor]]] = field(default_factory=list)

    def add(self, name: str, aliases: Iterable[str], whole: torch.Size, source: Source) -> None:
        """Take a tensor of shape `whole`, or a range of one."""
        room = Room(source.shape, source.dtype)
        self._sources.append((room, source.read))
        numel = torch.Size(source.shape).numel()
        self.parts.setdefault(WEIGHT, {})[name] = Part(room, list(whole), source.start, numel)
        self.module.update(dict.fromkeys(aliases, room))

    def write(self, writer: RecordWriter) -> None:
        """Write the values."""
        for room, read in self._sources:
            writer.append(room, read(), steady=True)


def names_of(module: nn.Module, state: dict[str, Any]) -> dict[int, list[str]]:
    """Return all names of each tensor of a state dict, by its id, those in the state dict first."""
    names: dict[int, list[str]] = {}
    for name, value in [*state.items(), *module.named_parameters(remove_duplicate=False)]:
        if isinstance(value, Tensor) and name not in names.setdefault(id(value), []):
            names[id(value)].append(name)
    return names


def describe(module: nn.Module, state: dict[str, Any], left_out: set[str]) -> dict[str, dict[str, Any]]:
    """Describe every tensor of a module for the manifest.

    Args:
        module: the model.
        state: its state dict with the parameters themselves.
        left_out: names whose values are not written.
    """
    found: dict[str, dict[str, Any]] = {}
    tensors = {
        id(value): value for value in [*state.values(), *module.parameters()] if isinstance(value, Tensor)
    }
    for key, names in names_of(module, state).items():
        tensor, slot = tensors[key], slot_of(tensors[key])
        name = names[0] if slot is None else slot.name
        found[name] = {
            "shape": list(tensor.shape if slot is None else slot.unit.shape_of(slot.index)),
            "aliases": [alias for alias in names if alias != name],
            "trained": slot is not None and slot.unit.trained,
            "dtype": _name(tensor.dtype),
        }
        if left_out.intersection(names):
            found[name]["left_out"] = True
        if not isinstance(tensor, nn.Parameter):
            found[name]["buffer"] = True
    return found


def plan_weights(
    state: dict[str, Any], units: list[Unit], names: dict[int, list[str]], *, first: bool
) -> Weights:
    """Choose the weights that this rank writes.

    Args:
        state: the module's state dict with its parameters themselves, those to be left out removed.
        units: all of the engine's.
        names: of parameters, by id.
        first: whether this rank writes what every rank has.
    """
    weights = Weights()
    wanted = {id(value) for value in state.values()}
    for unit in units:
        for index, source in _stored(unit, first=first):
            param = unit.params[index]
            if id(param) in wanted or unit.trained:
                aliases = [name for name in names[id(param)] if name in state] or unit.names[
                    index : index + 1
                ]
                weights.add(unit.names[index], aliases, unit.shape_of(index), source)
    seen: dict[int, str] = {}
    for name, value in state.items() if first else ():
        if isinstance(value, Tensor) and slot_of(value) is None:
            if id(value) in seen:
                weights.module[name] = weights.module[seen[id(value)]]
            else:
                seen[id(value)] = name
                source = Source(tuple(value.shape), value.dtype, 0, value.detach)
                weights.add(name, [name], value.shape, source)
    return weights


def _stored(unit: Unit, *, first: bool) -> Iterable[tuple[int, Source]]:
    """Yield what this rank writes of a unit's stored weights, by index; where they are sharded, masters do for them."""
    dtype = unit.dtypes.storage
    if not unit.sharding.releases:
        for index, view in enumerate(unit.views(unit.flat) if first else ()):
            yield index, Source(tuple(view.shape), dtype, 0, view.detach)
        return
    writes = unit.sharding.replica_group.rank == 0 and not unit.has_master
    for piece in unit.my_pieces() if writes else ():
        read = partial(unit.held.read_mine, piece.shard_start, piece.shard_stop)
        yield piece.index, Source((piece.numel,), dtype, piece.param_start, read)
    for index, numel in enumerate(unit.layout.numels):
        if numel == 0 and first:
            yield index, Source(tuple(unit.shape_of(index)), dtype, 0, partial(torch.empty, 0))


class OptimizerContents:
    """The masters and optimizer states that this rank writes.

    Attributes:
        parts: of them.
        scalars: states that are numbers, by parameter name: key -> [dtype or None, value].
    """

    def __init__(self, optimizer: ZeroOptimizer | None) -> None:
        self.parts: Parts = {}
        self.scalars: dict[str, dict[str, Any]] = {}
        self._optimizer = optimizer
        self._leaves: list[Leaf] = []
        if optimizer is not None:
            owned = [unit for unit in optimizer.units if unit.sharding.replica_group.rank == 0]
            self._leaves = [leaf for unit in owned for leaf in optimizer.states.leaves[unit]]
            for leaf in self._leaves:
                self._plan(leaf, optimizer)

    def _plan(self, leaf: Leaf, optimizer: ZeroOptimizer) -> None:
        unit = leaf.unit
        if unit.has_master:
            self._take(leaf, MASTER, leaf.tensor.dtype)
        for key, value in optimizer.state.get(leaf.tensor, {}).items():
            shape = optimizer.states.shape_of(leaf, value) if isinstance(value, Tensor) else None
            if shape is None or is_number(leaf, key, shape):
                number = _number(unit, leaf, key, value)
                for piece in leaf.pieces:
                    self.scalars.setdefault(unit.names[piece.index], {})[key] = number
            elif shape == leaf_shape(leaf):
                self._take(leaf, STATE + key, value.dtype)
            else:
                part = Part(Room(tuple(shape), value.dtype), list(shape), 0, shape.numel())
                self.parts.setdefault(STATE + key, {})[unit.names[leaf.pieces[0].index]] = part

    def _take(self, leaf: Leaf, kind: str, dtype: torch.dtype) -> None:
        """Make room for a leaf's part of an element-wise value."""
        for piece in leaf.pieces:
            name = leaf.unit.names[piece.index]
            named = self.parts.setdefault(kind, {})
            if name not in named:
                shape = list(leaf.unit.shape_of(piece.index))
                named[name] = Part(Room((0,), dtype), shape, piece.param_start, 0)
            part = named[name]  # tiles of one parameter follow each other
            part.numel += piece.numel
            part.room.shape = (part.numel,)

    def structure(self) -> dict[str, Any]:
        """Return the rooms by kind and name, as the file has them."""
        rooms = {
            kind: {name: part.room for name, part in named.items()} for kind, named in self.parts.items()
        }
        masters = rooms.pop(MASTER, {})
        states = {kind.removeprefix(STATE): named for kind, named in rooms.items()}
        return {"fp32_master": masters, "state": states, "scalars": self.scalars}

    def write(self, writer: RecordWriter) -> None:
        """Write the values, one leaf after the other: each is brought in once."""
        for leaf in self._leaves:
            assert self._optimizer is not None
            with self._optimizer.states.present(leaf, changed=False):
                values = {
                    STATE + key: value for key, value in self._optimizer.state.get(leaf.tensor, {}).items()
                }
                if leaf.unit.has_master:
                    values[MASTER] = leaf.tensor
                for kind, value in values.items():
                    self._write(leaf, kind, value, writer)

    def _write(self, leaf: Leaf, kind: str, value: Any, writer: RecordWriter) -> None:
        if not isinstance(value, Tensor) or is_number(leaf, kind.removeprefix(STATE), value.shape):
            return
        named = self.parts[kind]
        if value.shape != leaf_shape(leaf):
            writer.append(named[leaf.unit.names[leaf.pieces[0].index]].room, value, steady=True)
            return
        flat = value.reshape(-1)
        for piece in leaf.pieces:
            low = piece.shard_start - leaf.start
            room = named[leaf.unit.names[piece.index]].room
            writer.append(room, flat[low : low + piece.numel], steady=True)


def nbytes_of(parts: Parts) -> int:
    """Return the bytes of the values in parts."""
    return sum(part.room.nbytes for named in parts.values() for part in named.values())


def main_contents(
    client_state: dict[str, Any],
    schedule: Any,
    groups: list[dict[str, Any]],
    *,
    buffers: list[str],
    ranks: int,
    counters: dict[str, int],
) -> dict[str, Any]:
    """Return what the file of the first rank holds beside the weights.

    Args:
        client_state: the user's.
        schedule: its state dict, or None.
        groups: options of the param groups.
        buffers: names of the module's buffers.
        ranks: that wrote the checkpoint.
        counters: by name.

    Raises:
        UsageError: something of it cannot be saved.
    """
    client, client_types = to_plain(client_state, "client_state")
    plain_schedule, schedule_types = to_plain(schedule, "lr_scheduler.state_dict()")
    plain_groups, group_types = to_plain(groups, "optimizer.param_groups")
    return {
        **client,
        "lr_scheduler": plain_schedule,
        "optimizer": None,
        "buffer_names": buffers,
        "dp_world_size": ranks,
        "mp_world_size": 1,
        "ds_version": __version__,
        **counters,
        "engine": {
            "client_keys": list(client),
            "client_types": client_types,
            "schedule_types": schedule_types,
            "param_groups": plain_groups,
            "group_types": group_types,
        },
    }


def values_of(parts: Iterable[tuple[Parts, int]]) -> Values:
    """Describe parts in files for the manifest: parts with the index of their file."""
    values: Values = {}
    for by_kind, file in parts:
        for kind, named in by_kind.items():
            for name, part in named.items():
                place = Place(file, part.room.index, part.start, part.numel)
                values.setdefault(kind, {})[name] = Value(_name(part.room.dtype), part.shape, [place])
    return values


def is_number(leaf: Leaf, key: str, shape: torch.Size) -> bool:
    """Whether a state tensor is one number for a leaf as a whole, like its count of steps."""
    return len(shape) == 0 and (key == "step" or len(leaf_shape(leaf)) > 0)


def leaf_shape(leaf: Leaf) -> torch.Size:
    """The shape of a leaf's tensor, wherever it is."""
    return torch.Size([leaf.stop - leaf.start]) if leaf.shape is None else leaf.shape


def _number(unit: Unit, leaf: Leaf, key: str, value: Any) -> list[Any]:
    if isinstance(value, Tensor):
        return [_name(value.dtype), value.item()]
    if type(value) not in (type(None), bool, int, float, str):
        raise UsageError(
            f"optimizer: its state {key!r} of {unit.names[leaf.pieces[0].index]}: expected a tensor or a number, got a "
            f"{type(value).__name__}, which a checkpoint cannot hold"
        )
    return [None, value]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
