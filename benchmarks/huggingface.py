"""Measures what transformers' Trainer, from_pretrained and generate take on this project and on the original DeepSpeed.

    python benchmarks/huggingface.py [--rounds 3] [--tasks fine_tune,load,generate]

    fine_tune   a GPT-2 of 30M parameters with the Trainer, bf16 and fp32: time of a step; the weights of both
    load        from_pretrained of 500M parameters under ZeRO-3: time, and memory at the peak of a rank
    generate    64 tokens with a GPT-2 of 30M parameters that is sharded over the ranks

Each run is a fresh set of processes; rounds alternate. Results: huggingface.json and huggingface.md under
benchmarks/results.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from arguments import add_results, folder, python, some_of
from launch import HERE, interpreter_of, run_ranks
from results import header, header_lines, markdown_table, write

from deepspeed.common.commands import count

TRAINER_GOAL, LOAD_GOAL, GENERATE_GOAL = 1.3, 0.7, 2.0
MIB = 2**20
KINDS = ("ours", "original")


@dataclass(frozen=True)
class Task:
    """What is measured: the worker's task, at which stage, on how many ranks, in which number format."""

    name: str
    stage: int
    ranks: int
    precision: str = "bf16"

    def __str__(self) -> str:
        return f"{self.name}, {self.precision}, stage {self.stage}, ranks {self.ranks}"


TASKS = [
    *(
        Task("fine_tune", stage, ranks, precision)
        for precision in ("bf16", "fp32")
        for stage in (2, 3)
        for ranks in (1, 2)
    ),
    Task("load", 3, 2),
    Task("generate", 3, 2),
]


@dataclass(frozen=True)
class Run:
    """One set of processes and what its ranks reported."""

    task: Task
    kind: str
    ranks: list[dict[str, Any]]

    def most(self, figure: str) -> float:
        """The largest figure of any rank."""
        return max(float(rank[figure]) for rank in self.ranks)


def main() -> int:
    """Measure, print and write; 1 when a goal is not met."""
    options = parse(sys.argv[1:])
    head = header(options.note)
    runs: list[Run] = []
    apart: dict[str, list[float]] = {}
    with TemporaryDirectory(prefix="benchmark-huggingface-", dir=options.folder) as folder:
        home = Path(folder)
        make_models(home)
        for number in range(options.rounds):
            for task in (one for one in TASKS if one.name in options.tasks):
                for kind in KINDS[:: 1 if number % 2 == 0 else -1]:  # who runs first finds less memory warm
                    runs.append(measure(task, kind, home, options))
                    print(f"round {number + 1}, {task}, {kind}: {seconds(runs[-1]):.3f} s", file=sys.stderr)
                if task.name == "fine_tune":
                    apart.setdefault(str(task), []).append(difference(*weights_in(home).values()))
    print(report(runs, apart, head, options).read_text())
    return 0 if all(met for _, met in verdicts(runs)) else 1


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=count, default=3)
    parser.add_argument(
        "--steps", type=count, default=20, help="of the Trainer that are timed, after 4 others"
    )
    names = sorted({task.name for task in TASKS})
    parser.add_argument(
        "--tasks",
        type=some_of(names),
        default=names,
        help=f"comma-separated: {', '.join(names)}",
    )
    parser.add_argument("--folder", type=folder, default=Path("/var/tmp"), help="where models are written")
    parser.add_argument(
        "--original-python", type=python, help="a Python that has the original, transformers and accelerate"
    )
    add_results(parser)
    return parser.parse_args(arguments)


def make_models(home: Path) -> None:
    """Write the models that are loaded, once."""
    for name, layers, dim, vocabulary in (("load", 24, 1280, 20000), ("generate", 6, 512, 20000)):
        torch.manual_seed(0)
        config = transformers.GPT2Config(
            n_layer=layers, n_embd=dim, n_head=dim // 64, vocab_size=vocabulary, n_positions=128,
            bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(home / name, max_shard_size="400MB")


def measure(task: Task, kind: str, home: Path, options: argparse.Namespace) -> Run:
    """Run once; return what the ranks reported."""
    arguments = ["--task", task.name, "--stage", str(task.stage), "--precision", task.precision]
    arguments += ["--steps", str(options.steps)]
    arguments += ["--model", str(home / task.name), "--weights", str(weights_in(home)[kind])]
    interpreter = interpreter_of(kind, options.original_python)
    threads = max(1, (os.cpu_count() or 1) // task.ranks)
    ranks = run_ranks(
        interpreter, HERE / "huggingface_worker.py", arguments, ranks=task.ranks, threads=threads
    )
    return Run(task, kind, ranks)


def weights_in(home: Path) -> dict[str, Path]:
    """Where the last run of each kind left what it trained."""
    return {kind: home / f"{kind}.pt" for kind in KINDS}


def difference(one: Path, other: Path) -> float:
    """Return how far the final weights of two runs are apart, relative to how far training moved them."""
    ours, theirs = (torch.load(path, weights_only=True) for path in (one, other))
    apart = _distance(ours["end"], theirs["end"])
    return apart / _distance(theirs["start"], theirs["end"])


def _distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    squares = [float((one[name].float() - other[name].float()).square().sum()) for name in other]
    return math.sqrt(sum(squares))


def of(runs: Sequence[Run], task: Task, kind: str, figure: Callable[[Run], float]) -> float:
    """The median over the rounds."""
    return statistics.median(figure(run) for run in runs if (run.task, run.kind) == (task, kind))


def verdicts(runs: Sequence[Run]) -> list[tuple[str, bool]]:
    """Hold the figures against the goals."""
    found = []
    for task in dict.fromkeys(run.task for run in runs):
        if task.name == "load":
            time = of(runs, task, "ours", seconds) / of(runs, task, "original", seconds)
            found.append(
                _verdict(f"{task}: time, of the original's", time, time <= LOAD_GOAL, f"at most {LOAD_GOAL}")
            )
            peak = of(runs, task, "ours", peak_bytes) / of(runs, task, "original", peak_bytes)
            found.append(
                _verdict(f"{task}: memory at the peak, of the original's", peak, peak <= 1, "at most 1")
            )
            continue
        goal = TRAINER_GOAL if task.name == "fine_tune" else GENERATE_GOAL
        faster = of(runs, task, "original", seconds) / of(runs, task, "ours", seconds)
        found.append(_verdict(f"{task}: times as fast", faster, faster >= goal, f"at least {goal}"))
    return found


def _verdict(what: str, value: float, met: bool, goal: str) -> tuple[str, bool]:
    return f"- {what}: {value:.2f} (goal: {goal}, {'met' if met else 'NOT met'}).", met


def seconds(run: Run) -> float:
    """Seconds of a run: of a step where it trains."""
    return run.most("step" if run.task.name == "fine_tune" else "seconds")


def peak_bytes(run: Run) -> float:
    """Bytes that a rank needed at its peak."""
    return run.most("peak")


def report(
    runs: Sequence[Run], apart: dict[str, list[float]], head: dict[str, Any], options: argparse.Namespace
) -> Path:
    """Write JSON and Markdown; return the path of the page.

    Args:
        runs: what was measured.
        apart: distances of the two kinds' weights, by task.
        head: date and machine.
        options: of the command line.
    """
    versions = {name: runs[0].ranks[0]["versions"][name] for name in ("torch", "transformers")}
    versions |= {run.kind: run.ranks[0]["versions"]["deepspeed"] for run in runs}
    titles = ["", "ours s", "original s", "ours MiB", "original MiB", "results differ by"]
    rows = []
    for task in dict.fromkeys(run.task for run in runs):
        row = [str(task)]
        row += [f"{of(runs, task, kind, seconds):.3f}" for kind in KINDS]
        loads = task.name == "load"
        row += [f"{of(runs, task, kind, peak_bytes) / MIB:.0f}" if loads else "" for kind in KINDS]
        differ = f"{max(apart[str(task)]):.1e}" if str(task) in apart else ""
        if task.name == "generate":
            differ = f"{len({tuple(run.ranks[0]['tokens']) for run in runs if run.task == task}) - 1} texts"
        rows.append([*row, differ])
    paragraphs = [
        "# Hugging Face",
        f"Rounds: {options.rounds}, steps: {options.steps}; medians of the slowest rank.",
        *header_lines(head, versions),
        markdown_table(titles, rows),
        "\n".join(text for text, _ in verdicts(runs)),
        "*fine_tune*: a step of the Trainer, GPT-2 of 30M parameters, 4 x 128 tokens a rank. *results differ by*: "
        "distance of all weights after all steps, relative to how far these moved them (at stage 2 in bf16 "
        "the original starts from rounded weights, this project from those it is given). *load*: "
        "from_pretrained of 500M parameters, the library's modules imported before, memory beyond that before. "
        "*generate*: 64 tokens. The ranks share the processor's cores: one rank has two threads.",
    ]
    return write(
        "huggingface",
        {**head, "versions": versions, "runs": [asdict(run) for run in runs], "apart": apart},
        paragraphs,
        options.out,
    )


if __name__ == "__main__":
    sys.exit(main())
