"""What every row of a comparison does, whoever does it: the model, its precision, ranks and micro-batches."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from model import Shape

PRECISIONS = ("bf16", "fp32")


@dataclass(frozen=True)
class Work:
    """The same for all rows, so that their times can be compared; the defaults are the comparison at its simplest."""

    shape: Shape = field(default_factory=Shape)
    precision: str = "bf16"
    ranks: int = 2
    threads: int = 1
    accumulation: int = 1
    checkpointing: bool = False

    @property
    def tokens(self) -> int:
        """Count the tokens of a step, over all ranks."""
        return self.ranks * self.accumulation * self.shape.batch * self.shape.seq


def read_work(fields: dict[str, Any]) -> Work:
    """Make work from what `dataclasses.asdict` made of it."""
    return Work(**{**fields, "shape": Shape(**fields["shape"])})
