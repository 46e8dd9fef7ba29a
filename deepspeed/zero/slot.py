"""Slot: where a parameter's shard, gradient and optimizer state are found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from deepspeed.zero.gradients import UnitGradients
from deepspeed.zero.layout import Piece

if TYPE_CHECKING:
    from deepspeed.zero.optimizer import ZeroOptimizer


@dataclass(frozen=True)
class Slot:
    """A parameter's place, kept on it as ``ds_slot``; a pickled parameter leaves it behind."""

    optimizer: ZeroOptimizer
    gradients: UnitGradients
    index: int

    def my_piece(self) -> Piece | None:
        """The parameter's piece in this rank's shard, or None where it has none."""
        pieces = self.gradients.unit.my_pieces()
        return next((piece for piece in pieces if piece.index == self.index), None)

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


def slot_of(param: nn.Parameter) -> Slot | None:
    """Return a parameter's slot, or None where no engine trains it."""
    return getattr(param, "ds_slot", None)
