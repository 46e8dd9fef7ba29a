"""Measures how long saving and loading take beside the original DeepSpeed, and what they need.

    python benchmarks/checkpoints.py [--millions 300] [--stages 2,3] [--rounds 3] [--folder /mnt/disk]

A GPT is trained for a step, saved, changed and loaded; each run is a fresh set of processes. Before it is loaded a
checkpoint is dropped from the page cache, as after a restart.
Results: checkpoints.json and checkpoints.md under benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from arguments import add_original, add_results, folder, stages
from launch import HERE, interpreter_of, run_ranks
from model import Shape
from offload_memory import shape_of
from results import header, header_lines, markdown_table, write

from deepspeed.common.commands import count

SAVE_GOAL = LOAD_GOAL = 1.5
BLOCKING_GOAL = 0.25
"""Most that an asynchronous save may block training, of what the original's save takes."""
GB, MIB = 1e9, 2**20
KINDS = ("ours", "ours later", "original")


@dataclass(frozen=True)
class Run:
    """One set of processes and what its ranks reported."""

    kind: str
    stage: int
    ranks: list[dict[str, Any]]

    def most(self, part: str, figure: str) -> float:
        """The largest figure of any rank."""
        return max(rank[part][figure] for rank in self.ranks)


def main() -> int:
    """Measure, print and write; 1 when a goal is not met."""
    options = parse(sys.argv[1:])
    head, shape = header(options.note), shape_of(options.millions)
    runs: list[Run] = []
    for number in range(options.rounds):
        for stage in options.stages:
            for kind in KINDS:
                runs.append(measure(kind, stage, shape, options))
                save, load = (runs[-1].most(part, "seconds") for part in ("save", "load"))
                print(
                    f"round {number + 1}, stage {stage}, {kind}: save {save:.2f} s, load {load:.2f} s",
                    file=sys.stderr,
                    flush=True,
                )
    print(report(runs, shape, head, options).read_text())
    return 0 if all(met for _, met in verdicts(runs)) else 1


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--millions", type=count, default=300, help="parameters of the model")
    parser.add_argument("--stages", type=stages, default=[2, 3], help="comma-separated")
    parser.add_argument("--rounds", type=count, default=3)
    parser.add_argument("--ranks", type=count, default=2)
    parser.add_argument(
        "--folder", type=folder, default=Path("/var/tmp"), help="where checkpoints are written"
    )
    add_original(parser)
    add_results(parser)
    return parser.parse_args(arguments)


def measure(kind: str, stage: int, shape: Shape, options: argparse.Namespace) -> Run:
    """Run once; return what the ranks reported."""
    name = kind.split()[0]
    with TemporaryDirectory(prefix="benchmark-checkpoints-", dir=options.folder) as folder:
        arguments = ["--kind", name, "--stage", str(stage), "--shape", json.dumps(asdict(shape))]
        arguments += ["--folder", folder, *(["--later"] if kind == "ours later" else [])]
        interpreter = interpreter_of(name, options.original_python)
        worker = HERE / "checkpoints_worker.py"
        return Run(kind, stage, run_ranks(interpreter, worker, arguments, ranks=options.ranks, threads=1))


def median(runs: Sequence[Run], kind: str, stage: int, figure: Callable[[Run], float]) -> float:
    """The median over the rounds."""
    return statistics.median(figure(run) for run in runs if (run.kind, run.stage) == (kind, stage))


def verdicts(runs: Sequence[Run]) -> list[tuple[str, bool]]:
    """Hold the figures against the goals."""
    found = []
    for stage in sorted({run.stage for run in runs}):

        def of(kind: str, figure: Callable[[Run], float], stage: int = stage) -> float:
            return median(runs, kind, stage, figure)

        save, load = (of("original", partial_seconds(part)) for part in ("save", "load"))
        faster = save / of("ours", partial_seconds("save"))
        blocking = of("ours later", partial_seconds("save")) / save
        quicker = load / of("ours", partial_seconds("load"))
        size = of("ours", nbytes) / of("original", nbytes)
        found += [
            _verdict(
                f"stage {stage}: save, times as fast", faster, faster >= SAVE_GOAL, f"at least {SAVE_GOAL}"
            ),
            _verdict(
                f"stage {stage}: asynchronous save blocks training, of the original's save",
                blocking,
                blocking <= BLOCKING_GOAL,
                f"at most {BLOCKING_GOAL}",
            ),
            _verdict(
                f"stage {stage}: load, times as fast", quicker, quicker >= LOAD_GOAL, f"at least {LOAD_GOAL}"
            ),
            _verdict(f"stage {stage}: bytes, of the original's", size, size <= 1, "at most 1", 4),
        ]
    return found


def _verdict(what: str, value: float, met: bool, goal: str, digits: int = 2) -> tuple[str, bool]:
    return f"- {what}: {value:.{digits}f} (goal: {goal}, {'met' if met else 'NOT met'}).", met


def partial_seconds(part: str) -> Callable[[Run], float]:
    """Return a function that tells the seconds of a part."""
    return lambda run: run.most(part, "seconds")


def nbytes(run: Run) -> float:
    """Bytes of the checkpoint."""
    return float(run.ranks[0]["bytes"])


def report(runs: Sequence[Run], shape: Shape, head: dict[str, Any], options: argparse.Namespace) -> Path:
    """Write JSON and Markdown; return the path of the page."""
    versions = {"torch": runs[0].ranks[0]["versions"]["torch"]}
    versions |= {run.kind.split()[0]: run.ranks[0]["versions"]["deepspeed"] for run in runs}
    titles = ["", "save s", "step longer by s", "until on disk s", "extra MiB"]
    titles += ["load s", "extra MiB", "GB", "loss after"]
    rows = []
    for stage in options.stages:
        for kind in KINDS:

            def of(figure: Callable[[Run], float], kind: str = kind, stage: int = stage) -> float:
                return median(runs, kind, stage, figure)

            durable = of(lambda run: max(rank["durable"] for rank in run.ranks))
            rows.append(
                [
                    f"{kind}, stage {stage}",
                    f"{of(partial_seconds('save')):.2f}",
                    f"{of(lambda run: run.most('save', 'slower')):.2f}" if "later" in kind else "",
                    f"{durable:.2f}",
                    f"{of(lambda run: run.most('save', 'extra')) / MIB:.0f}",
                    f"{of(partial_seconds('load')):.2f}",
                    f"{of(lambda run: run.most('load', 'extra')) / MIB:.0f}",
                    f"{of(nbytes) / GB:.2f}",
                    f"{of(lambda run: run.ranks[0]['loss']):.4f}",
                ]
            )
    paragraphs = [
        "# Saving and loading",
        f"GPT of {options.millions}M parameters, AdamW, bf16; ranks: {options.ranks}, rounds: {options.rounds}; "
        "medians of the slowest rank.",
        *header_lines(head, versions),
        markdown_table(titles, rows),
        "\n".join(text for text, _ in verdicts(runs)),
        "*ours later* saves while training goes on: *save* is what the call takes and what the next update waits for "
        "values to be copied; *step longer by* is what the step in which all of that happens takes longer than the one "
        "before, copies included: there, writing shares the cores with training. *until on disk*: all of it, and "
        "`sync`; this project's saves are on the disk when they return, the original's are not. *extra*: resident "
        "memory at the peak beyond that before the call, cached pages of mapped files included.",
    ]
    document = {
        **head,
        "versions": versions,
        "verdicts": [text for text, _ in verdicts(runs)],
        "shape": asdict(shape),
        "runs": [asdict(run) for run in runs],
    }
    return write("checkpoints", document, paragraphs, options.out)


if __name__ == "__main__":
    sys.exit(main())
