"""Turns into figures: median, spread, ratios and the verdict on the goals of a comparison."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from results import markdown_table

SPEED_GOAL = 1.3
OFFLOAD_SPEED_GOAL = 1.5
HOST_GOAL = 1.05  # of our own time: on these machines host memory is where states are anyway
# Rows start alike and see the same data: only rounding may differ, this much of the fall in loss.
LOSS_TOLERANCE = 0.05
PHASES = ("forward", "backward", "step")
MIB = 2**20


@dataclass(frozen=True)
class Turn:
    """One run of one row: times in seconds (median over its steps), memory in bytes (largest rank).

    `gathers` are those of a step, on the rank with most; None where nobody counts. `disk` are the bytes that a
    rank read and wrote in a step.
    """

    row: str
    round: int
    total: float
    cpu: float
    phases: dict[str, float]
    peak: int
    peak_training: int
    first_step: float
    first_loss: float
    last_loss: float
    gathers: float | None
    disk: float


@dataclass(frozen=True)
class Summary:
    """A row over its turns; `against_...` say how many times as fast, pair by pair."""

    row: str
    label: str
    turns: int
    total: float
    fastest: float
    slowest: float
    cpu: float
    phases: dict[str, float]
    tokens_per_second: float
    peak: float
    first_step: float
    fall: float
    last_loss: float
    against_original: float | None
    against_ddp: float | None
    against_fsdp2: float | None
    against_resident: float | None
    gathers: float | None
    disk: float


def make_turn(row: str, number: int, ranks: Sequence[dict[str, Any]]) -> Turn:
    """Reduce what the ranks reported: a step lasts as long as on its slowest rank."""
    seconds = {
        name: median(max(steps) for steps in zip(*(r["seconds"][name] for r in ranks), strict=True))
        for name in (*PHASES, "total", "cpu")
    }
    losses = ranks[0]["losses"]
    gathers = [r["gathers"] for r in ranks if r["gathers"] is not None]
    return Turn(
        row=row,
        round=number,
        total=seconds["total"],
        cpu=seconds["cpu"],
        phases={name: seconds[name] for name in PHASES},
        peak=max(r["peak"] for r in ranks),
        peak_training=max(r["peak_training"] for r in ranks),
        first_step=max(r["first_step"] for r in ranks),
        first_loss=losses[0],
        last_loss=losses[-1],
        gathers=max(gathers, default=None),
        disk=max(r["disk"] for r in ranks),
    )


def summarise(turns: Sequence[Turn], tokens: int, label: Callable[[str], str]) -> list[Summary]:
    """Summarise each row in order of first appearance; `tokens` are those of one step over all ranks."""
    return [_summarise_row(row, turns, tokens, label(row)) for row in dict.fromkeys(t.row for t in turns)]


def _summarise_row(row: str, turns: Sequence[Turn], tokens: int, name: str) -> Summary:
    mine = [turn for turn in turns if turn.row == row]
    total = median(t.total for t in mine)
    gathers = [t.gathers for t in mine if t.gathers is not None]
    return Summary(
        row=row,
        label=name,
        turns=len(mine),
        total=total,
        fastest=min(t.total for t in mine),
        slowest=max(t.total for t in mine),
        cpu=median(t.cpu for t in mine),
        phases={phase: median(t.phases[phase] for t in mine) for phase in PHASES},
        tokens_per_second=tokens / total,
        peak=median(t.peak for t in mine),
        first_step=median(t.first_step for t in mine),
        fall=median(t.first_loss - t.last_loss for t in mine),
        last_loss=median(t.last_loss for t in mine),
        against_original=_ratio(turns, row, row.replace("ours", "original")) if "ours" in row else None,
        against_ddp=_ratio(turns, row, "ddp"),
        against_fsdp2=_ratio(turns, row, "fsdp2"),
        against_resident=_ratio(turns, row, resident) if (resident := without_tier(row)) != row else None,
        gathers=median(gathers) if gathers else None,
        disk=median(t.disk for t in mine),
    )


def without_tier(row: str) -> str:
    """Name the row that offloads nothing."""
    return ":".join(row.split(":")[:2])


def _ratio(turns: Sequence[Turn], row: str, reference: str) -> float | None:
    """How many times as fast as `reference`: the median over the rounds that have both."""
    times = {(turn.row, turn.round): turn.total for turn in turns}
    ratios = [
        times[reference, number] / times[row, number]
        for number in sorted({turn.round for turn in turns})
        if (reference, number) in times and (row, number) in times
    ]
    return median(ratios) if ratios else None


def render_table(summaries: Sequence[Summary]) -> str:
    """Lay out the summaries as Markdown, without the columns in which no row has a figure."""
    titles = (
        "row", "step ms", "min-max", "fwd", "bwd", "upd", "cpu ms", "tokens/s", "peak MiB", "disk MiB",
        "x original", "x DDP", "x FSDP2", "x without", "gathers", "last loss", "1st step s",
    )  # fmt: skip
    columns = zip(titles, *(_cells(s) for s in summaries), strict=True)
    title_row, *rows = zip(*(column for column in columns if set(column[1:]) != {"-"}), strict=True)
    return markdown_table(title_row, rows)


def _cells(s: Summary) -> list[str]:
    times = [f"{s.phases[phase] * 1e3:.0f}" for phase in PHASES]
    return [
        s.label,
        f"{s.total * 1e3:.0f}",
        f"{s.fastest * 1e3:.0f}-{s.slowest * 1e3:.0f}",
        *times,
        f"{s.cpu * 1e3:.0f}",
        f"{s.tokens_per_second:,.0f}",
        f"{s.peak / MIB:.0f}",
        f"{s.disk / MIB:.0f}" if s.disk >= MIB else "-",
        _times(s.against_original),
        _times(s.against_ddp),
        _times(s.against_fsdp2),
        _times(s.against_resident),
        "-" if s.gathers is None else f"{s.gathers:g}",
        f"{s.last_loss:.4f}",
        f"{s.first_step:.1f}",
    ]


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


def verdicts(summaries: Sequence[Summary]) -> list[str]:
    """Hold the figures against the goals: speed and memory beside the original, and equal losses.

    At stage 3, which does what FSDP2 does, speed and memory beside FSDP2 as well; with offload to host memory,
    time beside that without.
    """
    rows = {s.row: s for s in summaries}
    lines = []
    for mine in (s for s in summaries if s.row.startswith("ours")):
        original, fsdp2 = rows.get(mine.row.replace("ours", "original")), rows.get("fsdp2")
        if original is not None and mine.against_original is not None:
            lines.append(_verdict(mine, "the original", original, mine.against_original))
        if mine.row == "ours:3" and fsdp2 is not None and mine.against_fsdp2 is not None:
            lines.append(_verdict(mine, "FSDP2", fsdp2, mine.against_fsdp2))
        if mine.row.endswith(":host") and mine.against_resident is not None:
            share = 1 / mine.against_resident
            verdict = _met(share <= HOST_GOAL, f"goal: at most {HOST_GOAL}")
            lines.append(f"- {mine.label}: {share:.3f} of the time without offload ({verdict}).")
    return [*lines, *_loss_verdict(summaries)]


def _verdict(mine: Summary, name: str, other: Summary, ratio: float) -> str:
    goal = SPEED_GOAL if without_tier(mine.row) == mine.row else OFFLOAD_SPEED_GOAL
    return (
        f"- {mine.label}: {ratio:.2f} times as fast as {name} "
        f"({_met(ratio >= goal, f'goal {goal}')}); "
        f"{mine.peak / MIB:.0f} MiB beside {other.peak / MIB:.0f} MiB "
        f"({_met(mine.peak <= other.peak, 'goal: not above')})."
    )


def _loss_verdict(summaries: Sequence[Summary]) -> list[str]:
    ours = [s for s in summaries if s.row.startswith("ours")]
    plain = [s for row in ("ddp", "fsdp2") for s in summaries if s.row == row]
    if not ours or not plain:
        return []
    share = max(abs(s.last_loss - plain[0].last_loss) for s in ours) / abs(plain[0].fall)
    verdict = _met(share <= LOSS_TOLERANCE, f"goal: at most {LOSS_TOLERANCE:.0%}")
    name = {"ddp": "DDP", "fsdp2": "FSDP2"}[plain[0].row]
    return [f"- Last loss: this project is within {share:.1%} of {name}'s fall in loss ({verdict})."]


def _met(good: bool, goal: str) -> str:
    return f"{goal}, {'met' if good else 'NOT met'}"
