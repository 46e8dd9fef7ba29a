"""What a comparison is asked to do: its work, its rows, and how often it measures them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from arguments import add_original, add_results, add_shape, chosen_shape, file_name, folder
from model import Shape
from results import RESULTS
from rows import DEFAULT_ROWS, split_row
from work import PRECISIONS, Work

from deepspeed.common.commands import count, count_or_none

PAIRS, STEPS, WARMUP = 5, 12, 3
QUICK_PAIRS, QUICK_STEPS = 2, 6


@dataclass(frozen=True)
class Options:
    """A comparison's work, rows (in order), rounds, steps of a run, and where its files go."""

    work: Work = field(default_factory=Work)
    rows: tuple[str, ...] = DEFAULT_ROWS
    pairs: int = PAIRS
    steps: int = STEPS
    warmup: int = WARMUP
    swap: Path = Path("/var/tmp")
    original_python: Path | None = None
    note: str = ""
    name: str = "compare"
    out: Path = RESULTS


def parse(arguments: Sequence[str], description: str | None = None) -> Options:
    """Read the command line of compare.py; --quick only changes what is not given."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=_rows, default=DEFAULT_ROWS, help="comma-separated, in order")
    parser.add_argument("--pairs", type=count, help=f"rounds ({PAIRS}; quick: {QUICK_PAIRS})")
    parser.add_argument("--steps", type=count, help=f"timed steps a run ({STEPS}; quick: {QUICK_STEPS})")
    parser.add_argument("--warmup", type=count_or_none, default=WARMUP, help="steps before them")
    add_work(parser)
    add_places(parser)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and steps")
    parser.add_argument("--name", type=file_name, default=Options.name, help="file name of the results")
    given = parser.parse_args(arguments)
    return Options(
        work=chosen_work(parser, given),
        rows=given.rows,
        pairs=given.pairs or (QUICK_PAIRS if given.quick else PAIRS),
        steps=given.steps or (QUICK_STEPS if given.quick else STEPS),
        warmup=given.warmup,
        swap=given.swap,
        original_python=given.original_python,
        note=given.note,
        name=given.name,
        out=given.out,
    )


def add_work(parser: argparse.ArgumentParser) -> None:
    """Add what `chosen_work` reads."""
    parser.add_argument("--precision", choices=PRECISIONS, default=Work.precision)
    parser.add_argument("--ranks", type=count, default=Work.ranks)
    parser.add_argument("--threads", type=count, default=Work.threads, help="threads of a rank")
    parser.add_argument(
        "--accumulation", type=count, default=Work.accumulation, help="micro-batches of a step"
    )
    parser.add_argument("--checkpointing", action="store_true", help="run the blocks again in backward")
    add_shape(parser, Shape())


def chosen_work(parser: argparse.ArgumentParser, given: argparse.Namespace) -> Work:
    """Return the work of a command line."""
    return Work(
        shape=chosen_shape(parser, given),
        precision=given.precision,
        ranks=given.ranks,
        threads=given.threads,
        accumulation=given.accumulation,
        checkpointing=given.checkpointing,
    )


def add_places(parser: argparse.ArgumentParser) -> None:
    """Add where things are, and a note."""
    parser.add_argument(
        "--swap", type=folder, default=Options.swap, help="folder on the disk that rows with offload use"
    )
    add_original(parser)
    add_results(parser)


def _rows(text: str) -> tuple[str, ...]:
    rows = tuple(dict.fromkeys(text.split(",")))
    try:
        for row in rows:
            split_row(row)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return rows
