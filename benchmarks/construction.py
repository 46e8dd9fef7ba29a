"""Measures what a rank's memory holds while a model of a billion parameters is built under zero.Init.

    python benchmarks/construction.py [--runs 3] [--ranks 2]

Each rank is a process of its own. The layout predicts the growth at the peak: this rank's share of the bf16
parameters, and the largest parameter whole in fp32 and in bf16 while it is made.
Results: construction.json and construction.md under benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from arguments import add_results, add_shape, chosen_shape
from launch import HERE, run_ranks, this_project
from model import Shape, count_parameters, largest_parameter
from results import header, header_lines, markdown_table, write

from deepspeed.common.commands import count

GOAL = 0.15
MIB = 2**20
BF16, FP32 = 2, 4
BILLION = Shape(layers=19, dim=2048, heads=16, seq=1024, vocab=10240)


@dataclass(frozen=True)
class Prediction:
    """Bytes of a rank: the parameters it keeps, and the largest one while it is made."""

    kept: int
    making: int

    @property
    def peak(self) -> int:
        """Return both together."""
        return self.kept + self.making


def main() -> int:
    """Measure, print and write; 1 when the goal is not met."""
    options = parse(sys.argv[1:])
    shape = options.shape
    head = header(options.note)
    runs = []
    for number in range(options.runs):
        runs.append(measure(shape, options.ranks))
        peaks = ", ".join(f"{grown(record) / MIB:.0f}" for record in runs[-1])
        print(f"run {number + 1}  growth at the peak, rank by rank: {peaks} MiB", file=sys.stderr, flush=True)
    prediction = predict(shape, options.ranks)
    print(report(shape, runs, prediction, head, options).read_text())
    return 0 if apart(runs, prediction) <= GOAL else 1


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=count, default=3, help="fresh sets of processes")
    parser.add_argument("--ranks", type=count, default=2)
    add_results(parser)
    add_shape(parser, BILLION)
    given = parser.parse_args(arguments)
    given.shape = chosen_shape(parser, given)
    return given


def measure(shape: Shape, ranks: int) -> list[dict[str, Any]]:
    """Build the model once; return each rank's record."""
    arguments = ["--shape", json.dumps(asdict(shape))]
    return run_ranks(this_project(), HERE / "construction_worker.py", arguments, ranks=ranks, threads=1)


def predict(shape: Shape, ranks: int) -> Prediction:
    """Say what the layout says, in bytes of a rank."""
    return Prediction(
        kept=BF16 * count_parameters(shape) // ranks, making=(FP32 + BF16) * largest_parameter(shape)
    )


def grown(record: dict[str, Any]) -> int:
    """Bytes by which a rank has grown at its peak."""
    growth: int = record["peak"] - record["before"]
    return growth


def apart(runs: Sequence[Sequence[dict[str, Any]]], prediction: Prediction) -> float:
    """How far the rank furthest from the prediction is from it, as a share; a rank is its median run."""
    ranks = [median(grown(record) for record in records) for records in zip(*runs, strict=True)]
    return max(abs(growth / prediction.peak - 1) for growth in ranks)


def report(
    shape: Shape,
    runs: Sequence[Sequence[dict[str, Any]]],
    prediction: Prediction,
    head: dict[str, Any],
    options: argparse.Namespace,
) -> Path:
    """Write JSON and Markdown; return the path of the page."""
    versions = runs[0][0]["versions"]
    share = apart(runs, prediction)
    document = {
        **head,
        "versions": versions,
        "shape": asdict(shape),
        "parameters": count_parameters(shape),
        "prediction": {**asdict(prediction), "peak": prediction.peak},
        "apart": share,
        "runs": runs,
    }
    titles = [
        "rank",
        "before MiB",
        "growth at the peak MiB",
        "min-max",
        "of the prediction",
        "kept MiB",
        "seconds",
    ]
    paragraphs = [
        "# Building a large model under zero.Init",
        f"GPT of {count_parameters(shape) / 1e9:.2f} billion parameters: {shape.layers} layers, width {shape.dim}, "
        f"vocabulary {shape.vocab}; bf16, {options.ranks} ranks, a process each.",
        *header_lines(head, versions),
        f"The layout predicts {prediction.peak / MIB:.0f} MiB a rank: its share of the parameters, "
        f"{prediction.kept / MIB:.0f} MiB, and the largest parameter whole in fp32 and in bf16 while it is "
        f"made, {prediction.making / MIB:.0f} MiB. The whole model would be "
        f"{BF16 * count_parameters(shape) / MIB:.0f} MiB.",
        markdown_table(
            titles,
            [_cells(rank, records, prediction) for rank, records in enumerate(zip(*runs, strict=True))],
        ),
        f"- Growth at the peak: {share:.1%} from the prediction (goal: within {GOAL:.0%}, "
        f"{'met' if share <= GOAL else 'NOT met'}).",
        f"Medians of {len(runs)} runs. *growth at the peak*: the system's high-water mark of resident memory "
        "(VmHWM) since just before the first module, less what was resident then, library code included. "
        "*kept*: growth of anonymous and shared memory once the model stands.",
    ]
    return write("construction", document, paragraphs, options.out)


def _cells(rank: int, records: Sequence[dict[str, Any]], prediction: Prediction) -> list[str]:
    growth = [grown(record) for record in records]
    kept = median(record["kept"] for record in records)
    return [
        str(rank),
        f"{median(record['before'] for record in records) / MIB:.0f}",
        f"{median(growth) / MIB:.0f}",
        f"{min(growth) / MIB:.0f}-{max(growth) / MIB:.0f}",
        f"{median(growth) / prediction.peak:.1%}",
        f"{kept / MIB:.0f}",
        f"{median(record['seconds'] for record in records):.0f}",
    ]


if __name__ == "__main__":
    sys.exit(main())
