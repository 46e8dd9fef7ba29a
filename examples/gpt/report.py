"""What a run leaves behind: its numbers as JSON, a picture of the loss, and what to do next."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from deepspeed import DeepSpeedEngine
from gpt.data import Corpus
from gpt.progress import minutes
from gpt.weights import WEIGHTS

Curve = list[tuple[int, float]]  # (step, bits per byte)


@dataclass
class Result:
    """The numbers of a run; losses are bits per byte."""

    train: Curve = field(default_factory=list)
    validation: Curve = field(default_factory=list)
    order0: float = 0.0
    order1: float = 0.0
    seconds: float = 0.0

    def write(self, folder: Path) -> None:
        """Write ``result.json``."""
        (folder / "result.json").write_text(json.dumps(asdict(self), indent=2) + "\n")


def describe(corpus: Corpus, validation: np.ndarray, engine: DeepSpeedEngine) -> str:
    """Return two lines: the text and its split, the model and how it is trained."""
    shape = engine.shape
    weights = sum(param.numel() for param in engine.module.parameters())
    return (
        f"Text:  {len(corpus.train):,} bytes to train on (files: {len(corpus.train_names):,}), "
        f"{validation[:, 1:].size:,} bytes to validate (other files: {len(corpus.validation_names):,})\n"
        f"Model: {weights:,} weights (layers: {shape.layers}, width: {shape.dim}, context: {shape.seq} bytes), "
        f"ZeRO stage {engine.zero_optimization_stage()} on {_count(engine.dp_world_size, engine.device.type)}"
    )


def _count(ranks: int, device: str) -> str:
    return f"{ranks} {device} rank{'s' if ranks > 1 else ''}"


def scores(result: Result) -> str:
    """Return the closing table: the model beside the two that only count."""
    rows = (
        ("how often each byte occurs (order 0)", result.order0),
        ("how often it follows the last one (order 1)", result.order1),
        ("this model", result.validation[-1][1]),
    )
    lines = (f"  {name:<44} {bits:5.2f}" for name, bits in rows)
    return "\n".join(("Bits per byte of the validation text (lower is better):", *lines))


def draw(result: Result, path: Path) -> bool:
    """Draw the loss curves; return False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(*zip(*result.train, strict=True), color="tab:blue", linewidth=1, label="training")
    axes.plot(*zip(*result.validation, strict=True), "o-", color="tab:orange", label="validation")
    for order, bits, style in ((0, result.order0, ":"), (1, result.order1, "--")):
        axes.axhline(bits, color="gray", linestyle=style, label=f"order-{order} counts, validation")
    axes.set(xlabel="step", ylabel="bits per byte", title="Byte-level GPT")
    axes.legend()
    figure.savefig(path, dpi=150)
    return True


def next_steps(args: argparse.Namespace, ranks: int, result: Result) -> str:
    """Return how the run ended, and the commands that continue, sample and change it."""
    done = result.train[-1][0]
    early = (
        f" Stopped at step {done} of {args.steps}; --minutes gives it more time." if done < args.steps else ""
    )
    script, here = Path(sys.argv[0]), Path(args.output)
    launch = "python" if ranks == 1 else f"deepspeed --num_gpus {ranks}"
    start = f"{launch} {shlex.quote(str(script))}{_flags(args, 'deepspeed_config', 'data', 'batch', 'lr')}"
    weights, output = shlex.quote(str(here / WEIGHTS)), shlex.quote(f"{here}-2")
    onward = f"--init-from {weights} --steps {args.steps} --seed {args.seed + 1} --output {output}"
    sample = shlex.join(["python", str(script.with_name("sample_gpt.py")), str(here), "--prompt", "class "])
    return "\n".join(
        (
            f"Took {minutes(result.seconds)}. Results are in {here}/.{early}",
            f"Continue:    {start} {onward}",
            f"More text:   {sample}",
            f"Another one: {start} --layers 6 --dim 384 --steps 2000     (--help lists all options)",
        )
    )


def _flags(args: argparse.Namespace, *names: str) -> str:
    """Return the options of these names as they were given, each with a space in front."""
    words = ["--deepspeed"] if args.deepspeed else []
    for name in names:
        value = getattr(args, name)
        if value:
            words += [f"--{name}", *(value if isinstance(value, list) else [str(value)])]
    return f" {shlex.join(words)}" if words else ""
