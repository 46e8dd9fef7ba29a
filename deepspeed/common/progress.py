"""A bar for what takes long: on stderr, if that is a terminal, and only once it has taken a while."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

PATIENCE = 3.0
"""Seconds that pass before there is a bar."""


class ByteBar:
    """Count bytes, and show how many are left if they take long.

    Args:
        what: is done with them, such as "saving global_step40".
        total: how many there are, as far as is known; see `expect`.
        shown: False: never, as on all ranks but the first.
        patience: seconds without a bar.
        console: other than stderr.
        clock: seconds.
    """

    def __init__(
        self,
        what: str,
        total: int = 0,
        *,
        shown: bool = True,
        patience: float = PATIENCE,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.done = 0
        self._what, self._total = what, total
        self._console, self._clock = console, clock
        self._due = clock() + patience
        self._possible = shown and (sys.stderr.isatty() if console is None else console.is_terminal)
        self._bar: Progress | None = None

    def expect(self, nbytes: int) -> None:
        """Know of more bytes that are to come."""
        self._total += nbytes

    def advance(self, nbytes: int) -> None:
        """Count more bytes."""
        self.done += nbytes
        if self._bar is None and self._possible and self._clock() >= self._due:
            self._bar = self._begun()
        if self._bar is not None:
            total = max(self._total, self.done)
            self._bar.update(self._bar.task_ids[0], completed=self.done, total=total)

    def _begun(self) -> Progress:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=self._console or Console(stderr=True),
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        bar.add_task(self._what, total=self._total, completed=self.done)
        bar.start()
        return bar

    def __enter__(self) -> ByteBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()
