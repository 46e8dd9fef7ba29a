"""Printing tables: as they are on a terminal, as plain lines elsewhere."""

from __future__ import annotations

import sys
from io import StringIO
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType

PLAIN_WIDTH = 160


def show(part: RenderableType) -> None:
    """Print a table, or anything else that rich can draw."""
    from rich.console import Console

    if sys.stdout.isatty():
        Console(highlight=False, markup=False).print(part)
        return
    buffer = StringIO()
    Console(file=buffer, width=PLAIN_WIDTH, highlight=False, markup=False).print(part)
    print("\n".join(line.rstrip() for line in buffer.getvalue().splitlines()), end="\n\n")
