"""What an engine was made of, printed at the start on request (``dump_state``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deepspeed.common.logging import current_rank
from deepspeed.config.report import render_config

if TYPE_CHECKING:
    from rich.table import Table

    from deepspeed.engine.engine import DeepSpeedEngine


def show_state(engine: DeepSpeedEngine) -> None:
    """Print number formats and effective settings, on the first rank."""
    from rich.console import Console

    if current_rank() == 0:
        console = Console(markup=False)
        console.print(dtype_table(engine))
        console.print(render_config(engine.settings))


def dtype_table(engine: DeepSpeedEngine) -> Table:
    """Return one row per kind of parameter: in which dtype it is stored, computed, reduced and updated."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    rows = engine.get_parameter_dtypes()
    table = Table(title="number formats", box=SIMPLE_HEAD)
    for name in rows[0] if rows else ():
        table.add_column(name, justify="right" if name == "elements" else "left")
    for row in rows:
        table.add_row(*row.values())
    return table
