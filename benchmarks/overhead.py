"""Measures what an engine adds to a training step of a tiny model: this project beside the original.

    python benchmarks/overhead.py [--pairs 3] [--original-python PATH]

World size 1, an MLP of 4 layers of width 64, fp32, AdamW. Engine and bare torch loop alternate
within one process; the two engines alternate process by process. This project is measured on larger models too, of
one unit and of several, which tells what a step, a parameter and a unit cost.
Results: overhead.json and overhead.md under benchmarks/results.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from arguments import add_original, add_results, stages
from launch import HERE, interpreter_of, run_ranks
from results import header, header_lines, markdown_table, write

from deepspeed.common.commands import count

GOAL = 0.5
LAYERS, PARAMETERS_OF_LAYER = 4, 2
MANY, TOGETHER = 32, 4
"""Layers of the larger models, and how many of them are a unit where there are several."""
SHAPES = {"small": (LAYERS, 0), "many parameters": (MANY, 0), "many units": (MANY, TOGETHER)}
NAMES = {"ours": "this project", "original": "original 0.19.8"}
PACKAGES = {"ours": "this project", "original": "original DeepSpeed"}
Records = dict[tuple[str, int], list[dict[str, Any]]]
Shapes = dict[int, dict[str, list[dict[str, Any]]]]
"""By stage and name of SHAPES."""


def main() -> None:
    """Measure, print and write."""
    options = parse(sys.argv[1:])
    head = header(options.note)
    records: Records = {}
    shapes: Shapes = {stage: {name: [] for name in SHAPES} for stage in options.shape_stages}
    for number in range(options.pairs):
        for stage in options.stages:
            for kind in NAMES:
                record = measure(kind, stage, options)
                records.setdefault((kind, stage), []).append(record)
                print(
                    f"pair {number + 1}  {NAMES[kind]}, stage {stage}: {added(record) * 1e6:.0f} us",
                    file=sys.stderr,
                )
        for stage in shapes:
            for name, (layers, together) in SHAPES.items():
                shapes[stage][name].append(measure("ours", stage, options, layers, together))
            print(f"pair {number + 1}  larger models, stage {stage}", file=sys.stderr)
    print(report(records, shapes, head, options).read_text())


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=count, default=3, help="processes of each kind")
    parser.add_argument("--turns", type=count, default=9, help="turns of either loop in a process")
    parser.add_argument("--steps", type=count, default=200, help="steps of a turn")
    parser.add_argument("--stages", type=stages, default=[0, 1, 2], help="comma-separated")
    parser.add_argument("--shape-stages", type=stages, default=[0, 2, 3], help="of larger models")
    add_original(parser)
    add_results(parser)
    return parser.parse_args(arguments)


def measure(
    kind: str, stage: int, options: argparse.Namespace, layers: int = LAYERS, together: int = 0
) -> dict[str, Any]:
    """Run one process and return its record."""
    arguments = ["--stage", str(stage), "--turns", str(options.turns), "--steps", str(options.steps)]
    arguments += ["--layers", str(layers), "--together", str(together)]
    interpreter = interpreter_of(kind, options.original_python)
    return run_ranks(interpreter, HERE / "overhead_worker.py", arguments, ranks=1, threads=1)[0]


def added(record: dict[str, Any]) -> float:
    """Seconds a step the engine adds: the median over turns of engine less bare."""
    seconds = record["seconds"]
    middle: float = median(e - b for e, b in zip(seconds["engine"], seconds["bare"], strict=True))
    return middle


def costs(shapes: dict[str, list[dict[str, Any]]]) -> dict[str, tuple[float, float]]:
    """Divide seconds a step into those of a step, a parameter and a unit: what the engine adds, and the bare loop's.

    The bare loop has no units.
    """
    small, parameters, units = (
        (median(added(r) for r in runs), median(median(r["seconds"]["bare"]) for r in runs))
        for runs in (shapes[name] for name in SHAPES)
    )
    count, more = PARAMETERS_OF_LAYER * LAYERS, PARAMETERS_OF_LAYER * (MANY - LAYERS)
    each, bare = (parameters[0] - small[0]) / more, (parameters[1] - small[1]) / more
    unit = (units[0] - parameters[0]) / (MANY // TOGETHER - 1)
    return {
        "a step": (small[0] - count * each - unit, small[1] - count * bare),
        "a parameter": (each, bare),
        "a unit": (unit, 0.0),
    }


def report(records: Records, shapes: Shapes, head: dict[str, Any], options: argparse.Namespace) -> Path:
    """Write JSON and Markdown; return the path of the page."""
    medians = {key: median(added(record) for record in runs) for key, runs in records.items()}
    rows = [_cells(kind, stage, records[kind, stage], medians) for kind, stage in records]
    versions = {PACKAGES[kind]: runs[0]["versions"]["deepspeed"] for (kind, _), runs in records.items()}
    versions["torch"] = next(iter(records.values()))[0]["versions"]["torch"]
    lines = [verdict(stage, medians) for stage in options.stages]
    divided = {stage: costs(found) for stage, found in shapes.items()}
    document = {
        **head,
        "versions": versions,
        "costs": {stage: {name: found[0] for name, found in one.items()} for stage, one in divided.items()},
        "verdicts": lines,
        "runs": [
            {"kind": kind, "stage": stage, "added": [added(r) for r in runs], "records": runs}
            for (kind, stage), runs in records.items()
        ],
    }
    paragraphs = [
        "# What the engine adds to a step",
        "MLP of 4 layers of width 64, batch 8, fp32, AdamW, world size 1, one thread. "
        "The bare loop is forward, backward, fused AdamW and zero_grad.",
        *header_lines(head, versions),
        markdown_table(
            ["engine", "bare us", "engine us", "added us", "min-max", "share", "loss apart"], rows
        ),
        "\n".join(lines),
        "*added*: median over processes of the median over turns of engine less bare. *share*: of what "
        "the original adds at the same stage. *loss apart*: relative, "
        "between the two loops after the first steps.",
        *([_costs_table(divided), COSTS] if divided else []),
    ]
    return write("overhead", document, paragraphs, options.out)


COSTS = (
    f"What this project adds, divided: microseconds of a step that are there for any model, for each parameter and for "
    f"each unit, beside those of the bare loop. From models of {LAYERS} and {MANY} layers in one unit, and of {MANY} "
    f"layers in {MANY // TOGETHER} units."
)


def _costs_table(divided: dict[int, dict[str, tuple[float, float]]]) -> str:
    titles = ["added us", "a step", "a parameter", "a unit", "bare: a step", "bare: a parameter"]
    rows = [
        [
            f"stage {stage}",
            *(f"{engine * 1e6:.1f}" for engine, _ in found.values()),
            *(f"{found[name][1] * 1e6:.1f}" for name in ("a step", "a parameter")),
        ]
        for stage, found in divided.items()
    ]
    return markdown_table(titles, rows)


def _cells(
    kind: str, stage: int, runs: list[dict[str, Any]], medians: dict[tuple[str, int], float]
) -> list[str]:
    each = [added(record) * 1e6 for record in runs]
    bare, engine = (median(median(r["seconds"][name]) for r in runs) for name in ("bare", "engine"))
    apart = max(abs(r["losses"]["engine"] / r["losses"]["bare"] - 1) for r in runs)
    return [
        f"{NAMES[kind]}, stage {stage}",
        f"{bare * 1e6:.0f}",
        f"{engine * 1e6:.0f}",
        f"{medians[kind, stage] * 1e6:.0f}",
        f"{min(each):.0f}-{max(each):.0f}",
        f"{medians[kind, stage] / medians['original', stage]:.2f}" if kind == "ours" else "-",
        f"{apart:.1e}",
    ]


def verdict(stage: int, medians: dict[tuple[str, int], float]) -> str:
    """Hold a stage against the goal."""
    share = medians["ours", stage] / medians["original", stage]
    met = "met" if share <= GOAL else "NOT met"
    return f"- Stage {stage}: {share:.2f} of what the original adds (goal: at most {GOAL}, {met})."


if __name__ == "__main__":
    main()
