"""What the benchmarks' command lines accept, each refused with what is allowed: counts, stages, folders, a Python."""

from __future__ import annotations

import argparse
import math
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path

from model import Shape
from results import RESULTS

from deepspeed.common.commands import count


def counts(text: str) -> list[int]:
    """Read comma-separated counts; return them in ascending order, each once."""
    return sorted({count(part) for part in text.split(",")})


def positive(text: str) -> float:
    """Read a number above zero."""
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0 < found < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return found


def stages(text: str) -> list[int]:
    """Read comma-separated ZeRO stages; return them in ascending order, each once."""
    return sorted(map(int, some_of("0123")(text)))


def some_of(allowed: Iterable[str]) -> Callable[[str], list[str]]:
    """Return what reads comma-separated names of those allowed, in their order, each once."""
    known = list(allowed)

    def names(text: str) -> list[str]:
        given = list(dict.fromkeys(text.split(",")))
        for name in given:
            if name not in known:
                raise argparse.ArgumentTypeError(f"expected some of {', '.join(known)}, got {name!r}")
        return given

    return names


def folder(text: str) -> Path:
    """Read the path of a folder that can be written to."""
    path = Path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"expected a folder, and there is none at {text!r}")
    if not os.access(path, os.W_OK):
        raise argparse.ArgumentTypeError(f"expected a folder to write to; {text!r} cannot be written to")
    return path


def results_folder(text: str) -> Path:
    """Read the path of a folder for results, which is made if it is not there."""
    path = Path(text)
    there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    try:
        with tempfile.TemporaryDirectory(dir=there):
            pass
    except OSError as error:
        raise argparse.ArgumentTypeError(f"expected a folder to write to, got {text!r}: {error}") from error
    return path


def python(text: str) -> Path:
    """Read the path of an interpreter; a link stays one, since it is what makes an environment of it."""
    path = Path(text)
    if not (path.is_file() and os.access(path, os.X_OK)):
        raise argparse.ArgumentTypeError(f"expected a program such as .venv/bin/python, got {text!r}")
    return path.absolute()


def file_name(text: str) -> str:
    """Read the name of files, without a folder."""
    if text in ("", "..") or Path(text).name != text:
        raise argparse.ArgumentTypeError(
            f"expected a name without a folder, got {text!r}; --out says which folder"
        )
    return text


def add_original(parser: argparse.ArgumentParser) -> None:
    """Add which Python runs the original."""
    parser.add_argument(
        "--original-python", type=python, help="a Python that has the original, instead of making one"
    )


def add_results(parser: argparse.ArgumentParser) -> None:
    """Add where the results go, and a note in them."""
    parser.add_argument("--note", default="", help="a sentence to print with the results")
    parser.add_argument("--out", type=results_folder, default=RESULTS, help="folder of the results")


def add_shape(parser: argparse.ArgumentParser, default: Shape) -> None:
    """Add the sizes of the model, which `chosen_shape` reads."""
    for size in fields(Shape):
        parser.add_argument(f"--{size.name}", type=count, default=getattr(default, size.name))


def chosen_shape(parser: argparse.ArgumentParser, given: argparse.Namespace) -> Shape:
    """Return the sizes of a command line."""
    if given.dim % given.heads:
        parser.error(f"--dim: expected a multiple of --heads, which is {given.heads}, got {given.dim}")
    return Shape(**{size.name: getattr(given, size.name) for size in fields(Shape)})
