"""Trains one GPT under this project, the original DeepSpeed, DDP and FSDP2 in turn, and writes the figures.

    python benchmarks/compare.py            # every row, 5 rounds; makes the original's environment once
    python benchmarks/compare.py --quick    # 2 rounds of 6 steps
    python benchmarks/compare.py --rows ours:2,original:2 --precision fp32 --pairs 9 --name stage2_fp32
    python benchmarks/compare.py --rows ours:3,original:3,fsdp2 --accumulation 4 --name stage3_accumulation
    python benchmarks/compare.py --rows ours:3,ours:3:disk,original:3:disk --swap /mnt/nvme --name offload

A round runs each row once, a row beside the one it is compared with; each run is a fresh set of processes.
Results: compare.json, compare.md and compare.png (or another --name) under benchmarks/results.
suite.py runs all the comparisons there are; profile_step.py shows where the time of a row goes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from comparison_goals import verdicts
from comparison_options import Options, parse
from comparison_page import Page
from comparison_picture import draw
from comparison_table import Turn, make_turn, render_table, summarise
from launch import HERE, RunFailed, interpreter_of, run_ranks
from results import header, header_lines, write
from rows import label, split_row


@dataclass
class Comparison:
    """What has been measured so far."""

    options: Options
    head: dict[str, Any]
    turns: list[Turn] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def rounds(self) -> int:
        """Count the rounds that have begun."""
        return len({turn.round for turn in self.turns})


def main() -> int:
    """Run the comparison; 1 when a row failed."""
    options = parse(sys.argv[1:], __doc__)
    comparison = Comparison(options, header(options.note))
    print(measure(comparison).read_text())
    return 1 if comparison.failures else 0


def measure(comparison: Comparison) -> Path:
    """Run the rounds that are missing; return the path of the page."""
    options = comparison.options
    for number in range(comparison.rounds, options.pairs):
        for row in options.rows:
            if row not in comparison.failures:
                take_turn(comparison, row, number)
        # Written after each round, so that an interrupted run leaves what it has.
        write_results(comparison)
    return write_results(comparison)


def take_turn(comparison: Comparison, row: str, number: int) -> None:
    """Run one row once and keep its figures, or the reason why there are none."""
    try:
        ranks = run_row(comparison.options, row, "worker.py")
    except RunFailed as error:
        comparison.failures[row] = str(error)
        print(f"round {number + 1}  {label(row):26} failed\n{error}", file=sys.stderr, flush=True)
        return
    turn = make_turn(row, number, ranks)
    comparison.turns.append(turn)
    comparison.versions |= named_versions(row, ranks)
    print(
        f"round {number + 1}  {label(row):26} {turn.total * 1e3:6.0f} ms  {turn.peak / 2**20:6.0f} MiB"
        f"  loss {turn.last_loss:.4f}",
        file=sys.stderr,
        flush=True,
    )


def run_row(options: Options, row: str, worker: str) -> list[dict[str, Any]]:
    """Run a row once in a worker's processes; return what its ranks report."""
    arguments = ["--row", row, "--work", json.dumps(asdict(options.work))]
    arguments += ["--steps", str(options.steps), "--warmup", str(options.warmup)]
    with TemporaryDirectory(prefix="benchmark-swap-", dir=options.swap) as folder:
        return run_ranks(
            interpreter_of(split_row(row).kind, options.original_python),
            HERE / worker,
            [*arguments, "--swap", folder],
            ranks=options.work.ranks,
            threads=options.work.threads,
        )


def named_versions(row: str, ranks: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Name the versions that a row's ranks report."""
    found: dict[str, str] = dict(ranks[0]["versions"])
    if "deepspeed" in found:
        name = "original DeepSpeed" if split_row(row).kind == "original" else "this project"
        found[name] = found.pop("deepspeed")
    return found


def write_results(comparison: Comparison) -> Path:
    """Write JSON, Markdown and PNG; return the path of the page."""
    options = comparison.options
    summaries = summarise(comparison.turns, options.work.tokens, label)
    text = Page(options)
    document = {
        **comparison.head,
        "versions": comparison.versions,
        "work": asdict(options.work),
        "rows": options.rows,
        "pairs": options.pairs,
        "steps": options.steps,
        "warmup": options.warmup,
        "summaries": [asdict(s) for s in summaries],
        "failures": comparison.failures,
        "turns": [asdict(t) for t in comparison.turns],
    }
    paragraphs = [
        "# Training step, side by side",
        text.subject(),
        *header_lines(comparison.head, comparison.versions),
        *([render_table(summaries)] if summaries else []),
        "\n".join(verdict.line for verdict in verdicts(summaries, options.work)),
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
