"""Leaves: what the inner optimizer updates instead of the user's parameters.

An element-wise optimizer gets the contiguous runs of a unit's master shard that belong to one param group,
as flat tensors; an optimizer that needs whole parameters gets each of them in its own shape (the layout then
keeps parameters whole). Either way a leaf is a view: updating it updates the master shard.

Note [Leaves are split for unused parameters]
Plain PyTorch skips a parameter without a gradient: no weight decay, no momentum, no step counted. A run of
parameters has one gradient, so once a parameter is found to have had none on any rank it gets a leaf of its
own, with its part of the state, and is skipped like everywhere else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from deepspeed.errors import ConfigError
from deepspeed.zero.layout import Piece
from deepspeed.zero.unit import Unit


@dataclass(eq=False)
class Leaf:
    """A range of one unit's master shard that the optimizer updates as one tensor."""

    unit: Unit
    group: dict[str, Any] = field(repr=False)
    pieces: list[Piece]
    shape: torch.Size | None  # None: flat
    tensor: Tensor = field(default_factory=lambda: torch.empty(0), repr=False)

    @property
    def start(self) -> int:
        return self.pieces[0].shard_start

    @property
    def stop(self) -> int:
        return self.pieces[-1].shard_stop

    def of(self, shard: Tensor) -> Tensor:
        """View this leaf's range of any shard-sized tensor (master, gradient, storage)."""
        flat = shard[self.start : self.stop]
        return flat if self.shape is None else flat.view(self.shape)

    @contextmanager
    def writing_out(self) -> Iterator[Tensor | None]:
        """Give the tensor that new values are to be written to in storage precision; None where the leaf is that.

        Where the update runs on the host and the storage is on a device, it is the unit's mirror of that.
        """
        unit = self.unit
        if not unit.has_master:
            yield None
        elif unit.mirror is not None:
            yield self.of(unit.mirror)
        else:
            with unit.held.writing(self.start, self.stop, self.tensor.device) as out:
                yield out if self.shape is None else out.view(self.shape)

    def write_out(self) -> None:
        """Copy the leaf's values to storage."""
        with self.writing_out() as out:
            if out is not None:
                out.copy_(self.tensor)


def make_leaves(
    unit: Unit, group_of: Sequence[dict[str, Any]], *, whole_parameters: bool, tile: int | None = None
) -> list[Leaf]:
    """Cut a unit's master shard into leaves.

    Args:
        unit: the unit, whose master is in memory.
        group_of: per parameter of the unit, the param group it belongs to.
        whole_parameters: one leaf per parameter in its shape, instead of flat runs.
        tile: cut runs at multiples of so many elements of the shard, too.
    """
    pieces = unit.my_pieces()
    if whole_parameters:
        leaves = [Leaf(unit, group_of[p.index], [p], unit.params[p.index].shape) for p in pieces]
    else:
        runs = _runs(pieces, group_of, tile)
        leaves = [Leaf(unit, group_of[run[0].index], run, None) for run in runs]
    for leaf in leaves:
        leaf.tensor = leaf.of(unit.master)
    return leaves


def _runs(pieces: Sequence[Piece], group_of: Sequence[dict[str, Any]], tile: int | None) -> list[list[Piece]]:
    """Put neighbouring pieces of one param group together, cut at multiples of `tile`."""
    runs: list[list[Piece]] = []
    for piece in (part for whole in pieces for part in _tiled(whole, tile)):
        before = runs[-1][-1] if runs else None
        if (
            before is not None
            and group_of[before.index] is group_of[piece.index]
            and (tile is None or before.shard_start // tile == piece.shard_start // tile)
        ):
            runs[-1].append(piece)
        else:
            runs.append([piece])
    return runs


def _tiled(piece: Piece, tile: int | None) -> Iterator[Piece]:
    """Cut a piece at multiples of `tile` in the shard."""
    start = piece.shard_start
    while start < piece.shard_stop:
        stop = piece.shard_stop if tile is None else min(piece.shard_stop, (start // tile + 1) * tile)
        yield Piece(piece.index, piece.param_start + start - piece.shard_start, start, stop - start)
        start = stop


def take_state(leaf: Leaf, state: dict[Tensor, dict[str, Any]]) -> dict[str, Any]:
    """Cut a leaf's state out of the state its parameters have in an optimizer that was used before, or that
    makes state when it is made (Adagrad).

    Raises:
        ConfigError: parameters of one leaf have taken different numbers of steps.
    """
    states = [state.get(leaf.unit.params[piece.index]) or {} for piece in leaf.pieces]
    return {key: _joined(leaf, key, [one.get(key) for one in states]) for key in states[0]}


def _joined(leaf: Leaf, key: str, values: list[Any]) -> Any:
    first = values[0]
    params = [leaf.unit.params[piece.index] for piece in leaf.pieces]
    if (
        isinstance(first, Tensor)
        and all(
            isinstance(value, Tensor) and value.shape == param.shape
            for value, param in zip(values, params, strict=True)
        )
        and (first.dim() > 0 or key != "step")
    ):
        whole = torch.zeros(leaf.stop - leaf.start, dtype=first.dtype, device=leaf.tensor.device)
        for piece, value in zip(leaf.pieces, values, strict=True):
            part = value.reshape(-1)[piece.param_start : piece.param_stop]
            whole[piece.shard_start - leaf.start : piece.shard_stop - leaf.start] = part
        return whole if leaf.shape is None else whole.view(leaf.shape)
    if any(value is None or bool(value != first) for value in values):
        raise ConfigError(
            f"optimizer: its state {key!r} differs between parameters; initialize before its first step"
        )
    return first.clone() if isinstance(first, Tensor) else first


def split_leaf(leaf: Leaf, unused: set[int], state: dict[Tensor, dict[str, Any]]) -> list[Leaf]:
    """Give each unused parameter of a flat leaf a leaf of its own; what lies between stays together.

    The optimizer's `state` moves along: tensors of the leaf's size are cut, anything else is copied.
    """
    parts: list[list[Piece]] = []
    for piece in leaf.pieces:
        if parts and piece.index not in unused and parts[-1][-1].index not in unused:
            parts[-1].append(piece)
        else:
            parts.append([piece])
    if len(parts) == 1:
        return [leaf]
    old_state = state.pop(leaf.tensor, None)
    made = []
    for part in parts:
        new = Leaf(leaf.unit, leaf.group, part, None)
        new.tensor = leaf.tensor[new.start - leaf.start : new.stop - leaf.start]
        if old_state is not None:
            state[new.tensor] = {key: _cut(value, leaf, new) for key, value in old_state.items()}
        made.append(new)
    return made


def _cut(value: Any, old: Leaf, new: Leaf) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.numel() == old.tensor.numel() and value.dim() == 1:
        return value[new.start - old.start : new.stop - old.start]
    return value.clone()
