"""Counts what one of many ranks sends, keeps and does in a step, by simulation, beside the formulas of ZeRO.

    python benchmarks/scaling.py [--models 7B,70B] [--stages 1,2,3] [--ranks 8,64,512]

The real engine trains a decoder of the given size as rank 0 of so many: tensors have no values and collectives no
peers (simulation.py), so this takes no GPU and little memory. A process for each row, one at a time.
Results: scaling.json, scaling.md and scaling.png under benchmarks/results. Ends with 1 where something grows with
the number of ranks that should not.

Formulas (arXiv 1910.02054), P parameters of 2 bytes on N ranks, fp32 master and two moments of 12 bytes, gradients
that land in 2 bytes:

    stage   sent by a rank in a step     kept by a rank
    1, 2    2 x 2P (N - 1)/N             2P + (2 + 12)P/N
    3       3 x 2P (N - 1)/N             (2 + 2 + 12)P/N
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from arguments import add_results, counts, some_of, stages
from launch import HERE, Interpreter, run_ranks
from llama import SHAPES, count_parameters
from results import header, header_lines, markdown_table, write
from scaling_picture import draw

from deepspeed.common.commands import count

WEIGHT, GRADIENT, STATES = 2, 2, 12  # bytes for each parameter
NOISE = 2.0
"""How much more time than on the fewest ranks is not called growth: what is done for every rank takes 64 times as much
on 512 ranks as on 8."""
GB = 1e9


@dataclass(frozen=True)
class Run:
    """What a rank of one job did, and the sizes of the job."""

    model: str
    parameters: int
    stage: int
    ranks: int
    record: dict[str, Any]

    @property
    def moved(self) -> float:
        """Bytes that a rank sends in a step, if rings carry the collectives."""
        return sum(float(kind["moved"]) for kind in self.record["step"].values())

    @property
    def expected_moved(self) -> float:
        """The same by the formula."""
        times = 3 if self.stage == 3 else 2
        return times * WEIGHT * self.parameters * (self.ranks - 1) / self.ranks

    @property
    def kept(self) -> int:
        """Bytes of weights, gradients and states on a rank, before the update."""
        memory = self.record["memory"]
        return int(memory["weights"] + memory["gradients"] + memory["states"])

    @property
    def expected_kept(self) -> float:
        """The same by the formula."""
        whole, shared = (0, WEIGHT) if self.stage == 3 else (WEIGHT, 0)
        return whole * self.parameters + (shared + GRADIENT + STATES) * self.parameters / self.ranks

    @property
    def calls(self) -> dict[str, int]:
        """Collectives of a step by kind."""
        return {op: int(kind["calls"]) for op, kind in sorted(self.record["step"].items())}

    @property
    def calls_at_start(self) -> int:
        """Collectives while the model and the engine are made."""
        return sum(int(kind["calls"]) for kind in self.record["start"].values())


def main() -> int:
    """Simulate, print and write; 1 when something grows that should not."""
    options = parse(sys.argv[1:])
    head = header(options.note)
    runs = []
    for model in options.models:
        for stage in options.stages:
            for ranks in options.ranks:
                runs.append(simulate(model, stage, ranks, options.seq))
                print(f"{model}, stage {stage}, {ranks} ranks", file=sys.stderr, flush=True)
    print(report(runs, head, options).read_text())
    return 1 if growing(runs) else 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", type=some_of(SHAPES), default=["7B", "70B"], help=f"of {', '.join(SHAPES)}"
    )
    parser.add_argument("--stages", type=stages, default=[1, 2, 3])
    parser.add_argument("--ranks", type=counts, default=[8, 64, 512])
    parser.add_argument("--seq", type=count, default=2048, help="tokens of the one sample in a micro-batch")
    add_results(parser)
    return parser.parse_args(arguments)


def simulate(model: str, stage: int, ranks: int, seq: int) -> Run:
    """Train as one rank; return what it counted."""
    shape = SHAPES[model]
    interpreter = Interpreter(Path(sys.executable), {"PYTHONPATH": str(HERE.parent)})
    arguments = ["--shape", json.dumps(asdict(shape)), "--stage", str(stage), "--seq", str(seq)]
    arguments += ["--simulated-ranks", str(ranks)]
    (record,) = run_ranks(interpreter, HERE / "scaling_worker.py", arguments, ranks=1, threads=1)
    return Run(model, count_parameters(shape), stage, ranks, record)


def growing(runs: Sequence[Run]) -> list[str]:
    """Say what is more on more ranks and should not be."""
    watched: dict[str, tuple[Callable[[Run], float], float]] = {
        "collectives of a step": (lambda run: sum(run.calls.values()), 1.0),
        "collectives at the start": (lambda run: run.calls_at_start, 1.0),
        "memory that is kept": (lambda run: run.kept, 1.0),
        "weights gathered at the peak": (lambda run: run.record["memory"]["gathered"], 1.01),
        "Python time of a step": (lambda run: run.record["seconds"]["step"], NOISE),
        "Python time of the start": (lambda run: run.record["seconds"]["initialize"], NOISE),
    }
    found = []
    for rows in _jobs(runs):
        for what, (value, slack) in watched.items():
            few, many = value(rows[0]), max(value(run) for run in rows)
            if many > few * slack:
                found.append(
                    f"{rows[0].model}, stage {rows[0].stage}: {what}, from {few:g} on {rows[0].ranks} ranks to {many:g}"
                )
    return found


def _jobs(runs: Sequence[Run]) -> list[list[Run]]:
    """Put runs together that differ in the number of ranks alone, the fewest first."""
    jobs: dict[tuple[str, int], list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.ranks):
        jobs.setdefault((run.model, run.stage), []).append(run)
    return list(jobs.values())


def report(runs: Sequence[Run], head: dict[str, Any], options: argparse.Namespace) -> Path:
    """Write JSON, Markdown and a picture; return the path of the page."""
    versions = runs[0].record["versions"]
    document = {**head, "versions": versions, "runs": [entry(run) for run in runs]}
    sizes = ", ".join(f"{name} {count_parameters(SHAPES[name]):,}" for name in options.models)
    grows = growing(runs)
    verdict = "**Nothing grows with the number of ranks that should not**: no collectives, in a step or at the start, "
    verdict += "no memory, and no Python time (of which growth is called so from twice on)."
    if grows:
        verdict = "**Grows with the number of ranks, and should not:**\n\n" + "\n".join(
            f"- {x}" for x in grows
        )
    paragraphs = [
        "# Scaling, by simulation",
        f"Decoders with the shapes of Llama 2 (parameters: {sizes}), bf16, AdamW, clipping 1.0, no accumulation, a "
        f"micro-batch of 1 x {options.seq} tokens, otherwise defaults; made under zero.Init at stage 3. The engine of "
        "rank 0 runs on a simulated device, with fake tensors and a fake process group.",
        *header_lines(head, versions),
        verdict,
        "## Communication of a rank in a step",
        markdown_table(
            ["job", "sent GB", "formula GB", "ratio", "messages GB", "reduce_scatter", "all_gather",
             "all_reduce", "at the start"],
            [_communication(run) for run in runs],
        ),
        "*sent*: what a rank sends if rings carry the collectives, (N-1)/N of a buffer and twice that for an "
        "all-reduce. *formula*: 2 x 2P (N-1)/N at stages 1 and 2, 3 x 2P (N-1)/N at stage 3 (arXiv 1910.02054). "
        "*ratio*: ours by the formula; below 1 at stage 3 as weights that backward needs first are kept from "
        "forward (stage3_max_reuse_distance), small ones always (stage3_param_persistence_threshold), and as the "
        "backward of an embedding needs no table. "
        "*messages*: sum of the buffers. Then collectives by kind, and those of making model and engine, of any kind.",
        "## Memory of a rank",
        markdown_table(
            ["job", "weights GB", "gradients GB", "states GB", "kept GB", "formula GB", "ratio", "gathered GB"],
            [_memory(run) for run in runs],
        ),
        "*weights*: bf16. *gradients*: reduced, bf16, before the update. *states*: fp32 master weights and moments. "
        "*formula*: 2P + (2 + 12)P/N at stages 1 and 2, (2 + 2 + 12)P/N at stage 3. *ratio* above 1: equal shards, "
        "small weights whole at stage 3. *gathered*: most weights that were whole at a time; it depends on "
        "stage3_max_live_parameters and not on N. Not counted: activations, and gradients on their way (two units).",
        "## Python time of a step",
        markdown_table(
            ["job", "step s", "bare s", "ratio", "construct s", "initialize s"], [_time(run) for run in runs]
        ),
        "Processor seconds on the machine named above, most of which fake tensors take: an operation on one costs "
        "tens of microseconds. *bare*: forward and backward of the model alone, as fake tensors too. *ratio*: step "
        "by bare. What tells something is the column over N: the work of a rank does not depend on how many others "
        "there are; other programs on the machine move single figures by half. *construct*, *initialize*: the same for "
        "making the model and the engine.",
        "![memory and communication by ranks](scaling.png)",
    ]  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    draw(_jobs(runs), options.out / "scaling.png")
    return write("scaling", document, paragraphs, options.out)


def entry(run: Run) -> dict[str, Any]:
    """Return a run and its bytes beside those of the formulas."""
    return {
        **asdict(run),
        "sent": run.moved,
        "sent_by_formula": run.expected_moved,
        "kept": run.kept,
        "kept_by_formula": run.expected_kept,
    }


def _name(run: Run) -> str:
    return f"{run.model}, stage {run.stage}, {run.ranks} ranks"


def _communication(run: Run) -> list[str]:
    messages = sum(int(kind["message"]) for kind in run.record["step"].values())
    kinds = ("reduce_scatter_single", "all_gather_single", "all_reduce")
    return [
        _name(run),
        f"{run.moved / GB:.2f}",
        f"{run.expected_moved / GB:.2f}",
        f"{run.moved / run.expected_moved:.4f}",
        f"{messages / GB:.2f}",
        *(str(run.calls.get(kind, 0)) for kind in kinds),
        str(run.calls_at_start),
    ]


def _memory(run: Run) -> list[str]:
    memory = run.record["memory"]
    return [
        _name(run),
        *(f"{memory[kind] / GB:.3f}" for kind in ("weights", "gradients", "states")),
        f"{run.kept / GB:.3f}",
        f"{run.expected_kept / GB:.3f}",
        f"{run.kept / run.expected_kept:.4f}",
        f"{memory['gathered'] / GB:.3f}",
    ]


def _time(run: Run) -> list[str]:
    seconds = run.record["seconds"]
    return [
        _name(run),
        f"{seconds['step']:.2f}",
        f"{seconds['bare']:.2f}",
        f"{seconds['step'] / seconds['bare']:.2f}",
        f"{seconds['construct']:.1f}",
        f"{seconds['initialize']:.1f}",
    ]


if __name__ == "__main__":
    sys.exit(main())
