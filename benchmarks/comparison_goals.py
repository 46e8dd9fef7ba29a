"""What a comparison is held against: speed, the limit, memory and losses.

Goals are set for the model of 33M parameters in bf16 on 2 ranks, the default of `Work`, with 1 or 4 micro-batches,
and on 4 ranks; other work is held against lower ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from comparison_table import MIB, Summary
from rows import Row, split_row
from work import Work

SPEED = {0: 1.6, 1: 1.75, 2: 1.75, 3: 1.95}
SPEED_ACCUMULATING = 1.6
SPEED_OFFLOADED = 2.0
SPEED_CROWDED = 1.5  # 4 ranks share two cores
SPEED_ELSEWHERE, SPEED_OFFLOADED_ELSEWHERE = 1.3, 1.5
LIMIT = {0: 1.12, 1: 1.12, 2: 1.12, 3: 1.15}
DDP = 1.1
FSDP2, FSDP2_ELSEWHERE = 1.7, 1.3
MEMORY = 0.9
MEMORY_BESIDE_FSDP2 = 1.0
HOST = 1.05  # of our own time: on these machines host memory is where states are anyway
# Rows start alike and see the same data: only rounding may differ, this much of the fall in loss.
LOSS = 0.05


@dataclass(frozen=True)
class Verdict:
    """A figure beside its goal; `at_most` where less is better, `name` where there is no room for `text`."""

    row: str
    name: str
    value: float
    goal: float
    text: str
    at_most: bool = False

    @property
    def met(self) -> bool:
        """Tell whether the figure reaches the goal."""
        return self.value <= self.goal if self.at_most else self.value >= self.goal

    @property
    def line(self) -> str:
        """Say it in a line of Markdown."""
        bound = f"at most {self.goal:g}" if self.at_most else f"at least {self.goal:g}"
        return f"- {self.text} (goal: {bound}, {'met' if self.met else 'NOT met'})."


def verdicts(summaries: Sequence[Summary], work: Work) -> list[Verdict]:
    """Hold this project's rows against what stands beside them, and their losses against plain torch."""
    found = [
        verdict
        for mine in summaries
        if mine.row.startswith("ours")
        for verdict in (*_beside_original(mine, summaries, work), *_beside_torch(mine, summaries, work))
    ]
    return found + _losses(summaries)


def speed_goal(row: Row, work: Work) -> float:
    """How many times as fast as the original a row has to be."""
    if is_standard(replace(work, ranks=2)) and work.ranks == 4:
        return SPEED_CROWDED
    if not is_standard(work):
        return SPEED_OFFLOADED_ELSEWHERE if row.tier else SPEED_ELSEWHERE
    if row.tier:
        return SPEED_OFFLOADED
    return SPEED_ACCUMULATING if work.accumulation > 1 else SPEED[row.stage]


def is_standard(work: Work) -> bool:
    """Tell whether the goals of the 33M model hold, however many micro-batches a step has."""
    return replace(work, accumulation=1, threads=1) == Work()


def _beside_original(mine: Summary, summaries: Sequence[Summary], work: Work) -> list[Verdict]:
    original = {s.row: s for s in summaries}.get(mine.row.replace("ours", "original"))
    if original is None or mine.against_original is None or mine.share is None:
        return []
    ratio, goal = mine.against_original, speed_goal(split_row(mine.row), work)
    sizes = f"{mine.peak / MIB:.0f} MiB beside {original.peak / MIB:.0f} MiB"
    return [
        Verdict(
            mine.row, "x original", ratio, goal, f"{mine.label}: {ratio:.2f} times as fast as the original"
        ),
        Verdict(
            mine.row,
            "memory",
            mine.share,
            MEMORY,
            f"{mine.label}: {mine.share:.2f} of the original's peak memory, {sizes}",
            at_most=True,
        ),
    ]


def _beside_torch(mine: Summary, summaries: Sequence[Summary], work: Work) -> list[Verdict]:
    row, standard = split_row(mine.row), is_standard(work)
    if row.tier:
        return _beside_resident(mine) if row.tier == "host" else []
    found = []
    if standard and mine.over_alone is not None:
        text = f"{mine.label}: {mine.over_alone:.2f} times as long as one rank alone, the limit"
        found.append(Verdict(mine.row, "x limit", mine.over_alone, LIMIT[row.stage], text, at_most=True))
    if standard and row.stage == 0 and mine.against_ddp is not None:
        text = f"{mine.label}: {mine.against_ddp:.2f} times as fast as DDP"
        found.append(Verdict(mine.row, "x DDP", mine.against_ddp, DDP, text))
    fsdp2 = {s.row: s for s in summaries}.get("fsdp2")
    if row.stage == 3 and fsdp2 is not None and mine.against_fsdp2 is not None:
        text = f"{mine.label}: {mine.against_fsdp2:.2f} times as fast as FSDP2"
        goal = FSDP2 if standard else FSDP2_ELSEWHERE
        found.append(Verdict(mine.row, "x FSDP2", mine.against_fsdp2, goal, text))
        share = mine.peak / fsdp2.peak
        text = (
            f"{mine.label}: {share:.2f} of FSDP2's peak memory, "
            f"{mine.peak / MIB:.0f} MiB beside {fsdp2.peak / MIB:.0f} MiB"
        )
        found.append(Verdict(mine.row, "memory beside FSDP2", share, MEMORY_BESIDE_FSDP2, text, at_most=True))
    return found


def _beside_resident(mine: Summary) -> list[Verdict]:
    if mine.against_resident is None:
        return []
    share = 1 / mine.against_resident
    text = f"{mine.label}: {share:.3f} of the time without offload"
    return [Verdict(mine.row, "x without offload", share, HOST, text, at_most=True)]


def _losses(summaries: Sequence[Summary]) -> list[Verdict]:
    ours = [s for s in summaries if s.row.startswith("ours")]
    plain = [s for row in ("ddp", "fsdp2") for s in summaries if s.row == row]
    if not ours or not plain:
        return []
    worst = max(ours, key=lambda s: abs(s.last_loss - plain[0].last_loss))
    share = abs(worst.last_loss - plain[0].last_loss) / abs(plain[0].fall)
    name = {"ddp": "DDP", "fsdp2": "FSDP2"}[plain[0].row]
    text = f"Last loss: this project is {share:.3f} of {name}'s fall in loss from it"
    return [Verdict(worst.row, "loss", share, LOSS, text, at_most=True)]
