"""The table of results, and the bar that moves while they come."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.progress import track

from deepspeed.common import tables
from deepspeed.common.commands import in_words
from deepspeed.offload.tools.sweep import Result

BAR = 24


def gathered(results: Iterable[Result], total: int, what: str) -> list[Result]:
    """Return the results, with a bar on stderr while they come if that is a terminal."""
    console = Console(stderr=True)
    bar = track(results, what, total, console=console, transient=True, disable=not console.is_terminal)
    return list(bar)


def show(results: Sequence[Result], title: str, best: Result | None = None) -> None:
    """Print one line a setting; with `best`, a picture in characters too, and that line in bold."""
    table = tables.new_table(title)
    for name in ("block", "depth", "threads", "write GB/s", "read GB/s"):
        table.add_column(name, justify="right")
    if best is not None:
        table.add_column("", no_wrap=True)
    for result in results:
        table.add_row(*_cells(result, results, best), style="bold" if result is best else None)
    tables.show(table)


def _cells(result: Result, results: Sequence[Result], best: Result | None) -> list[str]:
    setting = result.setting
    cells = [in_words(setting.block_size), str(setting.queue_depth), str(setting.threads)]
    cells += ["-" if rate is None else f"{rate / 1e9:.2f}" for rate in (result.write, result.read)]
    if best is not None:
        share = result.score / max(one.score for one in results)
        cells.append("█" * round(BAR * share) + (" best" if result is best else ""))
    return cells
