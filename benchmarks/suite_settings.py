"""The comparisons of the suite by name: settings of compare.py, and benchmarks with a script of their own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from comparison_options import STEPS, WARMUP, Options
from model import Shape
from rows import DEFAULT_ROWS, OTHERS
from work import Work


@dataclass(frozen=True)
class Setting:
    """A comparison of training steps, whose results bear its name.

    `steps` and `warmup` are at most what a run has of them: fewer where a step is long.
    """

    name: str
    title: str
    work: Work
    rows: tuple[str, ...] = DEFAULT_ROWS
    steps: int = STEPS
    warmup: int = WARMUP

    def options(self, base: Options) -> Options:
        """Put this setting's work, rows and steps into the options that all settings share."""
        steps, warmup = min(self.steps, base.steps), min(self.warmup, base.warmup)
        return replace(base, name=self.name, work=self.work, rows=self.rows, steps=steps, warmup=warmup)


@dataclass(frozen=True)
class Single:
    """A benchmark with a script of its own, whose results bear its name.

    `rounds` is its option for how often both sides are measured; `quick` makes it short.
    """

    name: str
    title: str
    rounds: str
    quick: tuple[str, ...]
    beside_original: bool = True
    swaps: bool = False

    @property
    def script(self) -> str:
        """Its file."""
        return f"{self.name}.py"


WORK = Work()
EIGHT_MILLION = Shape(layers=5, dim=256, heads=4)
HUNDRED_TWENTY_MILLION = Shape(layers=12, dim=768, heads=12, vocab=22528)
STAGE_3_ROWS = ("ours:3", "original:3", *OTHERS)
OFFLOAD_ROWS = (
    "ours:2", "ours:2:host", "original:2:host",
    "ours:3", "ours:3:host", "original:3:host",
    "ours:3:disk", "original:3:disk", "ours:3:all_disk", "original:3:all_disk",
    *OTHERS,
)  # fmt: skip

LONG: dict[str, Any] = {"steps": 3, "warmup": 2}

SETTINGS = (
    Setting("step_bf16", "33M, bf16", WORK),
    Setting("step_fp32", "33M, fp32", replace(WORK, precision="fp32"), steps=6, warmup=2),
    Setting("step_bf16_acc4", "33M, bf16, 4 micro-batches", replace(WORK, accumulation=4), **LONG),
    Setting(
        "step_fp32_acc4",
        "33M, fp32, 4 micro-batches",
        replace(WORK, precision="fp32", accumulation=4),
        **LONG,
    ),
    Setting("checkpointing", "33M, bf16, checkpointed", replace(WORK, checkpointing=True), STAGE_3_ROWS),
    Setting("offload", "33M, bf16, offload", WORK, OFFLOAD_ROWS, steps=8),
    Setting("ranks4", "33M, bf16, 4 ranks", replace(WORK, ranks=4), steps=6, warmup=2),
    Setting("size_8m", "8M, bf16", replace(WORK, shape=EIGHT_MILLION)),
    Setting("size_120m", "120M, bf16", replace(WORK, shape=HUNDRED_TWENTY_MILLION), **LONG),
)
SINGLES = (
    Single("overhead", "what the engine adds to a step of a tiny MLP", "--pairs", ("--turns", "3")),
    Single(
        "adam_step", "the optimizer's step alone", "--rounds", ("--numel", "4194304"), beside_original=False
    ),
    Single(
        "checkpoints", "saving and loading", "--rounds", ("--millions", "30", "--rounds", "1"), swaps=True
    ),
    Single("import_time", "what the import takes", "--pairs", ("--pairs", "3")),
)
NAMES = tuple(each.name for each in (*SETTINGS, *SINGLES))
