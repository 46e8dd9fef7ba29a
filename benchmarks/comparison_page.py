"""The sentences around the table of a comparison: what was trained, how it was measured, what the rows do."""

from __future__ import annotations

from dataclasses import dataclass

from comparison_options import Options
from model import count_parameters
from rows import split_row

_ROWS = {
    "ddp": "*DDP*: model and gradient reduction in {precision}{masters}.",
    "fsdp2": (
        "*FSDP2*: fully_shard of each block and the root, parameters and reduction in {precision}, "
        "fp32 shards, fused AdamW; like ZeRO-3 it reduces in every micro-batch."
    ),
    "fsdp2_whole": (
        "*FSDP2, one reduction*: gradients stay whole between the micro-batches of a step and are "
        "reduced in the last one."
    ),
    "fsdp2_live": "*FSDP2, one gather*: parameters stay gathered from forward to backward.",
    "alone": (
        "*One rank alone*: DDP's step without DDP, the raw forward, backward and update of one rank without "
        "communication, which is the limit; every rank trains a replica of its own at once, so that the machine is "
        "as busy as in the other rows."
    ),
    "compute": "*Compute only*: every rank's forward and backward, without communication and update.",
}
_MASTERS = {
    "bf16": ", fp32 master weights kept by hand (cast gradients to fp32, clip, fused AdamW, copy back)",
    "fp32": ", fused AdamW",
}


@dataclass(frozen=True)
class Page:
    """The settings of a comparison, put in words."""

    options: Options

    def subject(self) -> str:
        """Say what was trained, in two lines."""
        work, shape = self.options.work, self.options.work.shape
        millions = count_parameters(shape) / 1e6
        extras = f", micro-batches of a step: {work.accumulation}" if work.accumulation > 1 else ""
        extras += ", every block checkpointed" if work.checkpointing else ""
        return (
            f"GPT of {millions:.1f}M parameters: {shape.layers} layers, width {shape.dim}, "
            f"sequence {shape.seq}, vocabulary {shape.vocab}, micro-batch {shape.batch}.\n"
            f"{work.precision}, AdamW, clipping 1.0; ranks: {work.ranks}, gloo, "
            f"threads of a rank: {work.threads}{extras}."
        )

    def method(self) -> str:
        """Say how the figures came about."""
        return (
            f"Rounds: {self.options.pairs}. In each, every row runs in fresh processes for "
            f"{self.options.warmup} warm-up and {self.options.steps} timed steps. A step lasts as long as on "
            "its slowest rank; a run is the median of its steps, a row the median of its runs. "
            "*x original* (same stage), *x DDP* and *x FSDP2* say how many times as fast, *x limit* (one rank "
            "alone) and *x compute* how many times as long, *of original* how much of its peak memory: medians "
            "of the ratios within a round. *cpu ms* is the processor time of a rank's "
            "step, all threads, which a busy machine disturbs less. Memory is the largest rank's peak "
            "over the life of the process, start and compilation included. *gathers*: how often a step "
            "brings a unit of parameters in, on a rank."
        )

    def rows(self) -> str:
        """Say what the rows do that are no engine."""
        kinds = {split_row(row).kind for row in self.options.rows}
        precision = self.options.work.precision
        text = " ".join(text for kind, text in _ROWS.items() if kind in kinds)
        return text.format(precision=precision, masters=_MASTERS[precision])
