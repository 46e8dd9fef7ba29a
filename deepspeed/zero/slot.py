"""Slot: where a parameter's shard, gradient and optimizer state are found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from deepspeed.zero.layout import Piece

if TYPE_CHECKING:
    from deepspeed.zero.gradients import UnitGradients
    from deepspeed.zero.optimizer import ZeroOptimizer
    from deepspeed.zero.unit import Unit


@dataclass(frozen=True, eq=False)
class Slot:
    """A parameter's place, kept on it as ``ds_slot``; a pickled parameter leaves it behind."""

    unit: Unit
    index: int

    @property
    def name(self) -> str:
        """The parameter's name."""
        return self.unit.names[self.index]

    def my_piece(self) -> Piece | None:
        """The parameter's piece in this rank's shard, or None where it has none."""
        return next((piece for piece in self.unit.my_pieces() if piece.index == self.index), None)

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


@dataclass(frozen=True, eq=False)
class TrainedSlot(Slot):
    """The slot of a parameter that an engine trains."""

    optimizer: ZeroOptimizer
    gradients: UnitGradients

    __reduce__ = Slot.__reduce__


def slot_of(param: Tensor) -> Slot | None:
    """Return a parameter's slot, or None where no engine and no ``zero.Init`` has it."""
    return getattr(param, "ds_slot", None)


def trained_slot(param: Tensor) -> TrainedSlot | None:
    """Return a parameter's slot, or None where no engine trains it."""
    slot = slot_of(param)
    return slot if isinstance(slot, TrainedSlot) else None


def forget_slot(param: Tensor) -> None:
    """Take a parameter from its engine; one that is released between uses stays in its unit."""
    slot = slot_of(param)
    if slot is None:
        return
    if slot.unit.sharding.marks_parameters:
        param.ds_slot = Slot(slot.unit, slot.index)  # type: ignore[attr-defined]
    else:
        del param.ds_slot  # type: ignore[attr-defined]


def is_zero_param(parameter: Any) -> bool:
    """Whether a parameter is sharded as stage 3 does it."""
    return hasattr(parameter, "ds_id")
