"""Measures how much memory a rank needs at stage 3 with the optimizer on disk, beside without offload.

    python benchmarks/offload_memory.py [--millions 100,300,600] [--ranks 2] [--swap /mnt/nvme]

A GPT of fixed width grows by layers and is made under zero.Init; each run is a fresh set of processes, sizes one
at a time. Blocks are checkpointed and sequences short, so that activations do not hide what is measured.
Results: offload_memory.json and offload_memory.md under benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from arguments import add_results, counts, folder
from launch import HERE, run_ranks, this_project
from model import Shape, count_parameters
from results import header, header_lines, markdown_table, write

from deepspeed.common.commands import count

COMPARED = 300
"""Millions of parameters of the model whose two peaks are compared."""
SHARE_GOAL = 0.5
FLAT_GOAL = 1.1
"""Most that the peak without the compute weights may be at the largest size, of that at the smallest."""
LIVE = 30_000_000
"""Elements that may be whole at a time: two blocks. With the default, a billion, the whole model would be."""
WIDTH = Shape(layers=1, dim=1024, heads=16, seq=64, vocab=2048, batch=1)
BF16 = 2
MIB = 2**20


@dataclass(frozen=True)
class Run:
    """One set of processes: the model, where its states were, and what each rank reported."""

    shape: Shape
    tier: str
    ranks: list[dict[str, Any]]

    @property
    def peak(self) -> int:
        """Bytes at the peak, on the rank with most."""
        return max(record["peak"] for record in self.ranks)

    @property
    def weights(self) -> int:
        """Bytes of the compute weights that a rank keeps: its share."""
        return BF16 * count_parameters(self.shape) // len(self.ranks)

    @property
    def besides(self) -> int:
        """Bytes at the peak without the weights."""
        return self.peak - self.weights


def main() -> int:
    """Measure, print and write; 1 when a goal is not met."""
    options = parse(sys.argv[1:])
    head = header(options.note)
    runs = []
    for millions in options.millions:
        for tier in ("", "disk") if millions <= options.most_resident else ("disk",):
            runs.append(measure(shape_of(millions), tier, options))
            print(
                f"{millions}M, {tier or 'memory'}: {runs[-1].peak / MIB:.0f} MiB", file=sys.stderr, flush=True
            )
    print(report(runs, head, options).read_text())
    return 0 if all(met for _, met in verdicts(runs)) else 1


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--millions",
        type=counts,
        default=[100, 300, 600],
        help="parameters of the models, comma-separated",
    )
    parser.add_argument(
        "--most-resident", type=count, default=COMPARED, help="largest size that is run without offload too"
    )
    parser.add_argument("--ranks", type=count, default=2)
    parser.add_argument("--steps", type=count, default=3)
    parser.add_argument("--swap", type=folder, default=Path("/var/tmp"), help="folder on the disk to use")
    add_results(parser)
    return parser.parse_args(arguments)


def shape_of(millions: int) -> Shape:
    """Choose the layers that come closest to so many million parameters."""
    one, two = (count_parameters(_with_layers(layers)) for layers in (1, 2))
    block = two - one
    return _with_layers(max(1, round((millions * 1e6 - (one - block)) / block)))


def _with_layers(layers: int) -> Shape:
    return Shape(**{**asdict(WIDTH), "layers": layers})


def measure(shape: Shape, tier: str, options: argparse.Namespace) -> Run:
    """Train once; return what the ranks reported."""
    with TemporaryDirectory(prefix="benchmark-swap-", dir=options.swap) as folder:
        arguments = ["--shape", json.dumps(asdict(shape)), "--tier", tier, "--swap", folder]
        arguments += ["--steps", str(options.steps), "--live", str(LIVE)]
        worker = HERE / "offload_memory_worker.py"
        return Run(shape, tier, run_ranks(this_project(), worker, arguments, ranks=options.ranks, threads=1))


def verdicts(runs: Sequence[Run]) -> list[tuple[str, bool]]:
    """Hold the figures against the goals, as far as there are figures for them."""
    found = []
    peaks = {(run.shape, run.tier): run for run in runs}
    compared = shape_of(COMPARED)
    if (compared, "") in peaks and (compared, "disk") in peaks:
        share = peaks[compared, "disk"].peak / peaks[compared, ""].peak
        found.append(
            _verdict(f"peak of {COMPARED}M with the optimizer on disk, of that without", share, SHARE_GOAL)
        )
    on_disk = [run for run in runs if run.tier == "disk"]
    if len(on_disk) > 1:
        growth = on_disk[-1].besides / on_disk[0].besides
        found.append(_verdict("besides the weights, largest model of smallest", growth, FLAT_GOAL))
    return found


def _verdict(what: str, value: float, goal: float) -> tuple[str, bool]:
    met = value <= goal
    return f"- {what}: {value:.2f} (goal: at most {goal}, {'met' if met else 'NOT met'}).", met


def report(runs: Sequence[Run], head: dict[str, Any], options: argparse.Namespace) -> Path:
    """Write JSON and Markdown; return the path of the page."""
    versions = runs[0].ranks[0]["versions"]
    document = {**head, "versions": versions, "runs": [asdict(run) for run in runs]}
    titles = ["model", "states", "peak MiB", "weights MiB", "besides MiB", "built", "initialize", "backward",
              "update", "disk MiB", "s", "last loss"]  # fmt: skip
    paragraphs = [
        "# Memory with the optimizer on disk",
        f"GPT of width {WIDTH.dim}, sequence {WIDTH.seq}, vocabulary {WIDTH.vocab}, micro-batch {WIDTH.batch}, "
        f"blocks checkpointed, made under zero.Init; stage 3, bf16, AdamW, clipping 1.0; ranks: {options.ranks}, "
        f"steps: {options.steps}.",
        *header_lines(head, versions),
        markdown_table(titles, [_cells(run) for run in runs]),
        "\n".join(line for line, _ in verdicts(runs)),
        "Both with and without, a rank has no more than some blocks whole at a time (stage3_max_live_parameters "
        f"{LIVE:,}). *peak*: largest resident memory (VmHWM) of a rank over its life, libraries included. "
        "*weights*: its share of the compute weights. *besides*: the difference. *built* to *update*: the peak within "
        "construction, initialize, any backward, any update. *disk*: read and written by a rank, for each step, "
        "the start included.",
    ]
    return write("offload_memory", document, paragraphs, options.out)


def _cells(run: Run) -> list[str]:
    def within(name: str) -> str:
        found = [r["phases"][key]["peak"] for r in run.ranks for key in r["phases"] if key.startswith(name)]
        return f"{max(found) / MIB:.0f}"

    return [
        f"{count_parameters(run.shape) / 1e6:.0f}M, {run.shape.layers} layers",
        run.tier or "memory",
        f"{run.peak / MIB:.0f}",
        f"{run.weights / MIB:.0f}",
        f"{run.besides / MIB:.0f}",
        *map(within, ("construction", "initialize", "backward", "update")),
        f"{max(r['disk'] for r in run.ranks) / MIB:.0f}",
        f"{max(r['seconds'] for r in run.ranks):.0f}",
        f"{run.ranks[0]['losses'][-1]:.4f}",
    ]


if __name__ == "__main__":
    sys.exit(main())
