"""The sentences around the table of a comparison: what was trained, how it was measured, what the rows do."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from model import Shape, count_parameters
from rows import split_row

_ROWS = {
    "ddp": (
        "*DDP*: bf16 model and bf16 gradient reduction, fp32 master weights kept by hand "
        "(cast gradients to fp32, clip, fused AdamW, copy back)."
    ),
    "fsdp2": (
        "*FSDP2*: fully_shard of each block and the root, bf16 parameters and reduction, "
        "fp32 shards, fused AdamW; like ZeRO-3 it reduces in every micro-batch."
    ),
    "fsdp2_whole": (
        "*FSDP2, one reduction*: gradients stay whole between the micro-batches of a step and are "
        "reduced in the last one."
    ),
    "fsdp2_live": "*FSDP2, one gather*: parameters stay gathered from forward to backward.",
    "compute": "*Compute only*: every rank's forward and backward without communication and update.",
}


@dataclass(frozen=True)
class Page:
    """The settings of a comparison, put in words."""

    shape: Shape
    options: argparse.Namespace

    def subject(self) -> str:
        """Say what was trained, in two lines."""
        shape, options = self.shape, self.options
        millions = count_parameters(shape) / 1e6
        extras = f", micro-batches of a step: {options.accumulation}" if options.accumulation > 1 else ""
        extras += ", every block checkpointed" if options.checkpointing else ""
        return (
            f"GPT of {millions:.1f}M parameters: {shape.layers} layers, width {shape.dim}, "
            f"sequence {shape.seq}, vocabulary {shape.vocab}, micro-batch {shape.batch}.\n"
            f"bf16, AdamW, clipping 1.0; ranks: {options.ranks}, gloo, threads of a rank: {options.threads}{extras}."
        )

    def method(self) -> str:
        """Say how the figures came about."""
        return (
            f"Rounds: {self.options.pairs}. In each, every row runs in fresh processes for "
            f"{self.options.warmup} warm-up and {self.options.steps} timed steps. A step lasts as long as on "
            "its slowest rank; a run is the median of its steps, a row the median of its runs. "
            "*x original* (same stage), *x DDP* and *x FSDP2* say how many times as fast: medians of the "
            "ratios within a round. *cpu ms* is the processor time of a rank's "
            "step, all threads, which a busy machine disturbs less. Memory is the largest rank's peak "
            "over the life of the process, start and compilation included. *gathers*: how often a step "
            "brings a unit of parameters in, on a rank."
        )

    def rows(self) -> str:
        """Say what the rows do that are no engine."""
        kinds = {split_row(row).kind for row in self.options.rows}
        return " ".join(text for kind, text in _ROWS.items() if kind in kinds)
