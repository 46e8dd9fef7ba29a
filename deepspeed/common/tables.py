"""Tables: framed on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from io import StringIO
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

PLAIN_WIDTH = 160
Rows = Iterable[tuple[str, str]]


def new_table(title: str, *, header: bool = True) -> Table:
    """Return an empty table, framed if it is for a terminal."""
    from rich.box import ROUNDED
    from rich.table import Table

    framed = sys.stdout.isatty()
    return Table(
        title=title,
        title_justify="left",
        box=ROUNDED if framed else None,
        pad_edge=framed,
        show_header=header,
    )


def new_listing(title: str, rows: Rows) -> Table:
    """Return a table of names and what is to be said of them."""
    made = new_table(title, header=False)
    made.add_column(style="bold", no_wrap=True)
    made.add_column(overflow="fold")
    for name, value in rows:
        made.add_row(name, value)
    return made


def show(part: RenderableType) -> None:
    """Print a table, or anything else that rich can draw."""
    from rich.console import Console

    if sys.stdout.isatty():
        Console(highlight=False, markup=False).print(part)
        return
    buffer = StringIO()
    Console(file=buffer, width=PLAIN_WIDTH, highlight=False, markup=False).print(part)
    print("\n".join(line.rstrip() for line in buffer.getvalue().splitlines()), end="\n\n")
