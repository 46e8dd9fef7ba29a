"""How far training is: a live table on a terminal, plain lines anywhere else, nothing on other ranks."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

LINES = 20  # plain lines in a whole run


@dataclass(frozen=True)
class Status:
    """One moment of training.

    `loss` is in nats per byte over all ranks since the last status, `memory` in bytes for each rank
    (resident memory without a device, allocated memory with one).
    """

    step: int
    steps: int
    loss: float
    bits: float
    lr: float
    grad_norm: float
    tokens_per_s: float
    memory: tuple[float, ...]
    seconds_left: float
    last: bool  # nothing follows: all steps are done, or the time is up

    def cells(self) -> dict[str, str]:
        """Return column names and texts."""
        return {
            "step": f"{self.step}/{self.steps}",
            "loss": f"{self.loss:.3f}",
            "bits/byte": f"{self.bits:.2f}",
            "lr": f"{self.lr:.1e}",
            "grad norm": f"{self.grad_norm:.2f}",
            "tokens/s": f"{self.tokens_per_s:,.0f}",
            "MB per rank": " ".join(f"{each / 1e6:.0f}" for each in self.memory[:8])
            + (" ..." if len(self.memory) > 8 else ""),
            "left": minutes(self.seconds_left),
        }


class Progress:
    """Shows nothing: for ranks that leave the talking to rank 0. The others are kinds of it."""

    def show(self, status: Status) -> None:
        """Show a status."""

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_raised: object) -> None:
        return None


class LineProgress(Progress):
    """Some twenty plain lines, for a file or a pipe."""

    def __init__(self) -> None:
        self._next = 0.0

    def show(self, status: Status) -> None:
        """Print the first status, the last one, and those in between that are due."""
        if status.step >= self._next or status.last:
            self._next = status.step + status.steps / LINES
            print("  ".join(f"{name} {text}" for name, text in status.cells().items()), flush=True)


class LiveProgress(Progress):
    """A table and a bar that are redrawn in place."""

    def __init__(self, console: Console) -> None:
        self._live = Live(console=console, auto_refresh=False)

    def __enter__(self) -> LiveProgress:
        self._live.start()
        return self

    def show(self, status: Status) -> None:
        """Draw the status over the last one."""
        table = Table(box=None, padding=(0, 2, 0, 0))
        for name in status.cells():
            table.add_column(name, justify="right", no_wrap=True, header_style="dim")
        table.add_row(*status.cells().values())
        bar = ProgressBar(total=status.steps, completed=status.step, width=72)
        self._live.update(Group(table, bar), refresh=True)

    def __exit__(self, *_raised: object) -> None:
        self._live.stop()


def progress_for(rank: int) -> Progress:
    """Return what suits this rank and where its output goes."""
    if rank != 0:
        return Progress()
    return LiveProgress(Console()) if sys.stdout.isatty() else LineProgress()


def minutes(seconds: float) -> str:
    """Return a duration as m:ss."""
    whole = round(seconds)
    return f"{whole // 60}:{whole % 60:02d}"
