"""Trains one GPT under this project, the original DeepSpeed, DDP and FSDP2 in turn, and writes the figures.

    python benchmarks/compare.py            # every row, 5 rounds; makes the original's environment once
    python benchmarks/compare.py --quick    # 2 rounds of 6 steps
    python benchmarks/compare.py --rows ours:2,original:2 --pairs 9
    python benchmarks/compare.py --rows ours:3,original:3,fsdp2 --accumulation 4 --name stage3_accumulation
    python benchmarks/compare.py --rows ours:3,ours:3:disk,original:3:disk --swap /mnt/nvme --name offload

A round runs each row once, a row beside the one it is compared with; each run is a fresh set of processes.
Results: compare.json, compare.md and compare.png (or another --name) under benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from comparison_page import Page
from comparison_picture import draw
from comparison_table import Turn, make_turn, render_table, summarise, verdicts
from launch import HERE, RunFailed, interpreter_of, run_ranks
from model import Shape
from results import RESULTS, header, header_lines, write
from rows import DEFAULT_ROWS, label, split_row


@dataclass
class Comparison:
    """What has been measured so far."""

    options: argparse.Namespace
    shape: Shape
    head: dict[str, Any]
    turns: list[Turn] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


def main() -> int:
    """Run the comparison; 1 when a row failed."""
    options = parse(sys.argv[1:])
    shape = Shape(**{f.name: getattr(options, f.name) for f in fields(Shape)})
    comparison = Comparison(options, shape, header(options.note))
    for number in range(options.pairs):
        for row in options.rows:
            if row not in comparison.failures:
                take_turn(comparison, row, number)
        # Written after each round, so that an interrupted run leaves what it has.
        page = write_results(comparison)
    print(page.read_text())
    return 1 if comparison.failures else 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line; --quick only changes what is not given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=_rows, default=list(DEFAULT_ROWS), help="comma-separated, in order")
    parser.add_argument("--pairs", type=int, help="rounds (5; quick: 2)")
    parser.add_argument("--steps", type=int, help="timed steps a run (12; quick: 6)")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="threads of a rank")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches of a step")
    parser.add_argument("--checkpointing", action="store_true", help="run the blocks again in backward")
    parser.add_argument(
        "--swap", type=Path, default=Path("/var/tmp"), help="folder on the disk that rows with offload use"
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds and steps")
    parser.add_argument(
        "--original-python", type=Path, help="a Python that has the original, instead of making one"
    )
    parser.add_argument("--note", default="", help="a sentence to print with the results")
    parser.add_argument("--name", default="compare", help="file name of the results")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    for size in fields(Shape):
        parser.add_argument(f"--{size.name}", type=int, default=size.default)
    options = parser.parse_args(arguments)
    options.pairs = options.pairs or (2 if options.quick else 5)
    options.steps = options.steps or (6 if options.quick else 12)
    return options


def _rows(text: str) -> list[str]:
    rows = text.split(",")
    try:
        for row in rows:
            split_row(row)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return rows


def take_turn(comparison: Comparison, row: str, number: int) -> None:
    """Run one row once and keep its figures, or the reason why there are none."""
    options = comparison.options
    kind = split_row(row).kind
    arguments = ["--row", row, "--shape", json.dumps(asdict(comparison.shape))]
    for name in ("steps", "warmup", "threads", "accumulation"):
        arguments += [f"--{name}", str(getattr(options, name))]
    arguments += ["--checkpointing"] if options.checkpointing else []
    try:
        with TemporaryDirectory(prefix="benchmark-swap-", dir=options.swap) as folder:
            ranks = run_ranks(
                interpreter_of(kind, options.original_python),
                HERE / "worker.py",
                [*arguments, "--swap", folder],
                ranks=options.ranks,
                threads=options.threads,
            )
    except RunFailed as error:
        comparison.failures[row] = str(error)
        print(f"round {number + 1}  {label(row):26} failed\n{error}", file=sys.stderr, flush=True)
        return
    turn = make_turn(row, number, ranks)
    comparison.turns.append(turn)
    found = ranks[0]["versions"]
    comparison.versions["torch"] = found["torch"]
    if "deepspeed" in found:
        name = "original DeepSpeed" if kind == "original" else "this project"
        comparison.versions[name] = found["deepspeed"]
    print(
        f"round {number + 1}  {label(row):26} {turn.total * 1e3:6.0f} ms  {turn.peak / 2**20:6.0f} MiB"
        f"  loss {turn.last_loss:.4f}",
        file=sys.stderr,
        flush=True,
    )


def write_results(comparison: Comparison) -> Path:
    """Write JSON, Markdown and PNG; return the path of the page."""
    options, shape = comparison.options, comparison.shape
    tokens = options.ranks * options.accumulation * shape.batch * shape.seq
    summaries = summarise(comparison.turns, tokens, label)
    text = Page(shape, options)
    document = {
        **comparison.head,
        "versions": comparison.versions,
        "options": {name: value for name, value in vars(options).items() if isinstance(value, (int, list))},
        "summaries": [asdict(s) for s in summaries],
        "failures": comparison.failures,
        "turns": [asdict(t) for t in comparison.turns],
    }
    paragraphs = [
        "# Training step, side by side",
        text.subject(),
        *header_lines(comparison.head, comparison.versions),
        render_table(summaries),
        "\n".join(verdicts(summaries)),
        *(f"**{label(row)} failed:** {why.splitlines()[-1]}" for row, why in comparison.failures.items()),
        text.method(),
        text.rows(),
        f"![Step time and memory]({options.name}.png)",
    ]
    page = write(options.name, document, paragraphs, options.out)
    draw(summaries, text.subject(), options.out / f"{options.name}.png")
    return page


if __name__ == "__main__":
    sys.exit(main())
