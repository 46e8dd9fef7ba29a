"""What a rank's memory holds for training, counted and moved."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from deepspeed.errors import UsageError
from deepspeed.zero.parking import Parking

if TYPE_CHECKING:
    from rich.table import Table

    from deepspeed.zero.gatherer import Gatherer
    from deepspeed.zero.optimizer import ZeroOptimizer
    from deepspeed.zero.reducer import Reducer
    from deepspeed.zero.unit import Unit


@dataclass(frozen=True)
class MemoryReport:
    """Bytes on this rank; activations are not counted.

    Attributes:
        parameters: stored weights kept between uses.
        masters: the copies that are updated, where they are not the stored weights themselves.
        optimizer: the optimizer's states.
        on_disk: stored weights, masters and states that are on disk; no memory.
        gradients: gradients kept now.
        gathered: whole parameters that were brought in, now.
        peak_gathered: the most of these at once.
        gathers: how often a unit was gathered.
    """

    parameters: int
    masters: int
    optimizer: int
    on_disk: int
    gradients: int
    gathered: int
    peak_gathered: int
    gathers: int

    @property
    def persistent(self) -> int:
        """Bytes that stay from step to step."""
        return self.parameters + self.masters + self.optimizer

    def table(self) -> Table:
        """Lay the figures out for a terminal."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        table = Table(title="memory of this rank", box=SIMPLE_HEAD)
        table.add_column("what")
        table.add_column("bytes", justify="right")
        table.add_column("MiB", justify="right")
        for name in (
            "parameters",
            "masters",
            "optimizer",
            "persistent",
            "on_disk",
            "gradients",
            "gathered",
            "peak_gathered",
        ):
            value = getattr(self, name)
            table.add_row(name.replace("_", " "), f"{value:,}", f"{value / 2**20:,.1f}")
        return table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=80)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get()


class MemoryControl(nn.Module):
    """The part of the engine that answers for memory."""

    _units: list[Unit]
    _zero: ZeroOptimizer | None
    _reducer: Reducer | None
    _gatherer: Gatherer | None

    def memory_report(self) -> MemoryReport:
        """Count what this rank holds."""
        units = self._units
        meter = self._gatherer.meter if self._gatherer is not None else None
        gradients = self._reducer.gradients if self._reducer is not None else []
        return MemoryReport(
            parameters=sum(unit.held.nbytes for unit in units),
            masters=sum(_nbytes(unit.master) for unit in units if unit.has_master),
            optimizer=sum(_nbytes(one) for one in self._state_tensors()),
            on_disk=sum(unit.held.nbytes_on_disk for unit in units)
            + (self._zero.states.nbytes_away if self._zero is not None else 0),
            gradients=sum(one.nbytes for one in gradients),
            gathered=meter.nbytes if meter else 0,
            peak_gathered=meter.peak_nbytes if meter else 0,
            gathers=meter.gathers if meter else 0,
        )

    def empty_partition_cache(self) -> None:
        """Release every gathered parameter that nothing uses."""
        if self._gatherer is not None:
            self._gatherer.release_all()

    def offload_states(
        self,
        include: Iterable[Any] | None = None,
        device: Any = "cpu",
        pin_memory: bool = True,
        non_blocking: bool = False,
    ) -> None:
        """Move states of an idle engine to the host, until `reload_states` (see `ZeroOptimizer.offload_states`)."""
        self._parking().offload_states(include, device, pin_memory, non_blocking)

    def reload_states(self, non_blocking: bool = False) -> None:
        """Bring back what `offload_states` moved."""
        self._parking().reload_states(non_blocking)

    def _parking(self) -> Parking:
        if self._zero is None:
            raise UsageError(
                "engine.offload_states: this engine has no optimizer, so there are no states to move; give "
                "deepspeed.initialize an optimizer"
            )
        self._zero.states.will_change()
        return self._zero.parking

    def _state_tensors(self) -> list[Tensor]:
        if self._zero is None:
            return []
        return [
            one for state in self._zero.state.values() for one in state.values() if isinstance(one, Tensor)
        ]


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
