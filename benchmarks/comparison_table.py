"""Turns into figures: median, spread and ratios of a comparison's rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from results import markdown_table

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
    """A row over its turns, and pair by pair beside others.

    `against_...` say how many times as fast it is; `over_...` how many times as long it takes; `share` is its
    peak memory as a part of the original's.
    """

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
    over_alone: float | None
    over_compute: float | None
    share: float | None
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
    original = row.replace("ours", "original") if "ours" in row else None
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
        against_original=_ratio(turns, original, row),
        against_ddp=_ratio(turns, "ddp", row),
        against_fsdp2=_ratio(turns, "fsdp2", row),
        against_resident=_ratio(turns, resident, row) if (resident := without_tier(row)) != row else None,
        over_alone=_ratio(turns, row, "alone"),
        over_compute=_ratio(turns, row, "compute"),
        share=_ratio(turns, row, original, lambda turn: turn.peak),
        gathers=median(gathers) if gathers else None,
        disk=median(t.disk for t in mine),
    )


def without_tier(row: str) -> str:
    """Name the row that offloads nothing."""
    return ":".join(row.split(":")[:2])


def _ratio(
    turns: Sequence[Turn],
    row: str | None,
    other: str | None,
    figure: Callable[[Turn], float] = lambda t: t.total,
) -> float | None:
    """Divide a figure of `row` by that of `other`: the median over the rounds that have both."""
    figures = {(turn.row, turn.round): figure(turn) for turn in turns}
    ratios = [
        figures[row, number] / figures[other, number]
        for number in sorted({turn.round for turn in turns})
        if (row, number) in figures and (other, number) in figures
    ]
    return median(ratios) if ratios else None


def render_table(summaries: Sequence[Summary]) -> str:
    """Lay out the summaries as Markdown, without the columns in which no row has a figure."""
    titles = (
        "row", "step ms", "min-max", "fwd", "bwd", "upd", "cpu ms", "tokens/s", "peak MiB", "of original", "disk MiB",
        "x original", "x DDP", "x FSDP2", "x without", "x limit", "x compute", "gathers", "last loss", "1st step s",
    )  # fmt: skip
    columns = zip(titles, *(_cells(s) for s in summaries), strict=True)
    title_row, *rows = zip(*(column for column in columns if set(column[1:]) != {"-"}), strict=True)
    return markdown_table(title_row, rows)


def _cells(s: Summary) -> list[str]:
    phases = [f"{s.phases[phase] * 1e3:.0f}" for phase in PHASES]
    return [
        s.label,
        f"{s.total * 1e3:.0f}",
        f"{s.fastest * 1e3:.0f}-{s.slowest * 1e3:.0f}",
        *phases,
        f"{s.cpu * 1e3:.0f}",
        f"{s.tokens_per_second:,.0f}",
        f"{s.peak / MIB:.0f}",
        times(s.share),
        f"{s.disk / MIB:.0f}" if s.disk >= MIB else "-",
        times(s.against_original),
        times(s.against_ddp),
        times(s.against_fsdp2),
        times(s.against_resident),
        times(s.over_alone),
        times(s.over_compute),
        "-" if s.gathers is None else f"{s.gathers:g}",
        f"{s.last_loss:.4f}",
        f"{s.first_step:.1f}",
    ]


def times(ratio: float | None) -> str:
    """Write a ratio; a dash where there is none."""
    return "-" if ratio is None else f"{ratio:.2f}"
