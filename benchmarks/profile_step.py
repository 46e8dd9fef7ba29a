"""Shows where the time of a row's step goes, beside the raw work of one rank, and writes it down line by line.

    python benchmarks/profile_step.py ours:2
    python benchmarks/profile_step.py ours:3 --precision fp32 --accumulation 4
    python benchmarks/profile_step.py original:2 --original-python PATH

The row, `alone` (forward, backward and update without communication) and `compute` (no update either) run in turn
under torch's profiler on every rank. Results: profile_ROW.json and profile_ROW.md under benchmarks/results.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

from arguments import file_name
from compare import named_versions, run_row
from comparison_options import WARMUP, Options, add_places, add_work, chosen_work
from comparison_page import Page
from profile_kinds import LINES, by_line
from results import header, header_lines, markdown_table, write
from rows import label, split_row

from deepspeed.common.commands import count, count_or_none

STEPS = 6
MOST = 12
PHASES = ("forward", "backward", "step")
BESIDE = ("alone", "compute")
FACTS: dict[str, Callable[[dict[str, Any]], float]] = {
    "step without the profiler, ms": lambda rank: rank["seconds"]["total"] * 1e3,
    "page faults": lambda rank: rank["faults"],
    "page faults that read a disk": lambda rank: rank["faults_from_disk"],
    "times the process gave up its processor": lambda rank: rank["switches"],
    "ms in the system, all threads": lambda rank: rank["system"] * 1e3,
    "ms of processor time of other threads": lambda rank: rank["other_threads"] * 1e3,
}
MEMORY = {
    "before there is a model": "bare",
    "tensors between steps": "tensors",
    "shared with other ranks between steps": "shared",
    "at the peak of a step": "peak",
}
Ranks = Sequence[dict[str, Any]]


def main() -> None:
    """Profile, print and write."""
    options = parse(sys.argv[1:])
    head = header(options.note)
    found: dict[str, Ranks] = {}
    for row in options.rows:
        print(f"profiling {label(row)}", file=sys.stderr, flush=True)
        found[row] = run_row(options, row, "profile_worker.py")
    versions: dict[str, str] = {}
    for row, ranks in found.items():
        versions |= named_versions(row, ranks)
    document = {**head, "versions": versions, "work": asdict(options.work), "rows": found}
    page = write(options.name, document, paragraphs(found, options, head, versions), options.out)
    print(page.read_text())


def parse(arguments: Sequence[str]) -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("row", type=_row, help="as in rows.py: ours:2, original:3:host, ddp, ...")
    parser.add_argument("--steps", type=count, default=STEPS, help="steps without and under the profiler")
    parser.add_argument("--warmup", type=count_or_none, default=WARMUP, help="steps before them")
    parser.add_argument("--name", type=file_name, help="file name of the results (profile_ROW)")
    add_work(parser)
    add_places(parser)
    given = parser.parse_args(arguments)
    return Options(
        work=chosen_work(parser, given),
        rows=tuple(dict.fromkeys((given.row, *BESIDE))),
        steps=given.steps,
        warmup=given.warmup,
        swap=given.swap,
        original_python=given.original_python,
        note=given.note,
        name=given.name or f"profile_{given.row.replace(':', '_')}",
        out=given.out,
    )


def _row(text: str) -> str:
    try:
        split_row(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def paragraphs(
    found: dict[str, Ranks], options: Options, head: dict[str, Any], versions: dict[str, str]
) -> list[str]:
    """Write the page: what a step's time is made of, what else it costs, and its slowest operators."""
    row = options.rows[0]
    return [
        f"# Where a step goes: {label(row)}",
        Page(options).subject(),
        *header_lines(head, versions),
        lines_table(found, row),
        facts_table(found),
        memory_table(found),
        "## The slowest operators",
        operators_table(found, row),
        f"Means of {options.steps} steps. Times of the first and the last table are from steps under torch's "
        "profiler, which makes operators and Python slower: see the step without it. An operator's time is its own, "
        "without those that it calls; page faults it causes are in it. *between ranks*: least and most of a rank. "
        "*waiting*: what is no operator and is spent off the processor. *more*: beside one rank alone, "
        "which does the forward, the backward and the update of the whole model without communication.",
    ]


def lines_table(found: dict[str, Ranks], row: str) -> str:
    """Lay out the milliseconds of each line: the row by phase, then what the same line takes elsewhere."""
    sorted_rows = {name: [by_line(rank) for rank in ranks] for name, ranks in found.items()}
    others = [name for name in BESIDE if name != row]
    titles = ["", *("fwd", "bwd", "upd"), "ms", "between ranks", *map(label, others), "more"]
    cells = []
    for line in (*LINES, "all"):
        mine = [_total(rank, line) for rank in sorted_rows[row]]
        beside = {name: _mean(_total(rank, line) for rank in sorted_rows[name]) for name in found}
        phases = (_mean(_total(rank, line, (phase,)) for rank in sorted_rows[row]) for phase in PHASES)
        cells.append(
            [
                line,
                *(f"{spent:.1f}" for spent in phases),
                f"{beside[row]:.1f}",
                f"{min(mine):.1f}-{max(mine):.1f}",
                *(f"{beside[name]:.1f}" for name in others),
                f"{beside[row] - beside['alone']:+.1f}",
            ]
        )
    return markdown_table(titles, cells)


def _total(rank: dict[str, dict[str, float]], line: str, phases: Sequence[str] = PHASES) -> float:
    """Sum a line of a rank, or all of them, in milliseconds."""
    chosen = LINES if line == "all" else (line,)
    return sum(rank[one].get(phase, 0.0) for one in chosen for phase in phases) * 1e3


def _mean(values: Iterable[float]) -> float:
    each = list(values)
    return sum(each) / len(each)


def facts_table(found: dict[str, Ranks]) -> str:
    """Lay out what else a step costs, means over ranks."""
    cells = [
        [name, *(f"{_mean(map(fact, ranks)):,.0f}" for ranks in found.values())]
        for name, fact in FACTS.items()
    ]
    return markdown_table(["of a step", *map(label, found)], cells)


def memory_table(found: dict[str, Ranks]) -> str:
    """Lay out where memory is, means over ranks."""
    cells = [
        [name, *(f"{_mean(rank['memory'][key] / 2**20 for rank in ranks):,.0f}" for ranks in found.values())]
        for name, key in MEMORY.items()
    ]
    return markdown_table(["MiB of a rank", *map(label, found)], cells)


def operators_table(found: dict[str, Ranks], row: str) -> str:
    """Lay out the operators in which the row spends most, on rank 0, beside one rank alone."""
    mine, alone = found[row][0], found["alone"][0]
    spent = {
        (phase, name): seconds for phase, each in mine["operators"].items() for name, seconds in each.items()
    }
    cells = [
        [
            f"`{name}`",
            {"step": "update"}.get(phase, phase),
            f"{mine['calls'][phase][name]:.0f}",
            f"{spent[phase, name] * 1e3:.1f}",
            f"{alone['calls'][phase].get(name, 0):.0f}",
            f"{alone['operators'][phase].get(name, 0.0) * 1e3:.1f}",
        ]
        for phase, name in sorted(spent, key=lambda key: -spent[key])[:MOST]
    ]
    return markdown_table(["operator", "in", "calls", "ms", "calls alone", "ms alone"], cells)


if __name__ == "__main__":
    main()
