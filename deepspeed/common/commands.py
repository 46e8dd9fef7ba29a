"""What commands have in common: reading sizes, ending with one sentence."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from deepspeed.errors import DeepSpeedError

UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


def size(text: str) -> int:
    """Read ``4096``, ``256K``, ``1M`` or ``2G``; at least 1."""
    number, unit = (text[:-1], text[-1:].upper()) if text[-1:].upper() in UNITS else (text, "")
    try:
        nbytes = int(number) * UNITS.get(unit, 1)
    except ValueError:
        nbytes = 0
    if nbytes < 1:
        raise argparse.ArgumentTypeError(f"expected a size such as 4096, 256K, 1M or 2G, got {text!r}")
    return nbytes


def count(text: str) -> int:
    """Read a whole number of at least 1."""
    return number_from(text, 1)


def count_or_none(text: str) -> int:
    """Read a whole number of at least 0."""
    return number_from(text, 0)


def number_from(text: str, low: int) -> int:
    """Read a whole number of at least `low`."""
    try:
        number = int(text)
    except ValueError:
        number = low - 1
    if number < low:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least {low}, got {text!r}")
    return number


def in_words(nbytes: float) -> str:
    """Write a size as `size` reads it."""
    for unit, factor in reversed(UNITS.items()):
        if nbytes >= factor and nbytes % factor == 0:
            return f"{nbytes // factor:.0f}{unit}"
    return f"{nbytes:.0f}"


def run(name: str, command: Callable[[Sequence[str] | None], int | None], args: Sequence[str] | None) -> None:
    """Run a command and end with the code that it returns, if that is one.

    What it cannot do ends it with 2 and one sentence, an interrupt with 130.
    """
    try:
        code = command(args)
        sys.stdout.flush()
    except DeepSpeedError as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = None
    except OSError as error:  # a file or folder that cannot be read or written
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
    if code:
        sys.exit(code)
