"""The picture of a comparison: step time by phase, and peak memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from comparison_table import MIB, PHASES, Summary

_TINTS = {
    "ours": "#1769aa",
    "original": "#c0562f",
    "ddp": "#6b7280",
    "fsdp2": "#6b7280",
    "fsdp2_whole": "#6b7280",
    "fsdp2_live": "#6b7280",
    "alone": "#b8bdc6",
    "compute": "#b8bdc6",
}
_OPACITY = {"forward": 0.45, "backward": 0.7, "step": 1.0}


def draw(summaries: Sequence[Summary], title: str, path: Path) -> None:
    """Save the picture of `summaries`, first row on top, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    height = 1.6 + 0.42 * len(summaries)
    figure, (times, memory) = pyplot.subplots(
        1, 2, figsize=(11, height), sharey=True, width_ratios=(3, 2), layout="constrained"
    )
    figure.suptitle(title, fontsize=11)
    _draw_times(times, summaries)
    _draw_memory(memory, summaries)
    times.set_yticks(range(len(summaries)), [s.label for s in summaries])
    times.invert_yaxis()
    for axes in (times, memory):
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", color="#e5e7eb")
        axes.set_axisbelow(True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _draw_times(axes: Any, summaries: Sequence[Summary]) -> None:
    for place, s in enumerate(summaries):
        # Medians of phases do not add up to the median of their sum; the bar is to be as long as the latter.
        stretch = s.total / sum(s.phases.values())
        left = 0.0
        for phase in PHASES:
            width = s.phases[phase] * stretch * 1e3
            axes.barh(place, width, left=left, color=_tint(s), alpha=_OPACITY[phase], height=0.7)
            left += width
        total = s.total * 1e3
        spread = [[total - s.fastest * 1e3], [s.slowest * 1e3 - total]]
        axes.errorbar(total, place, xerr=spread, color="#111827", capsize=2, linewidth=1)
        axes.annotate(
            f"{total:.0f}", (s.slowest * 1e3, place), (5, 0), textcoords="offset points", va="center"
        )
    axes.margins(x=0.1)
    axes.set_xlabel("ms a step: forward, backward, update; whiskers: fastest and slowest run")


def _draw_memory(axes: Any, summaries: Sequence[Summary]) -> None:
    for place, s in enumerate(summaries):
        axes.barh(place, s.peak / MIB, color=_tint(s), height=0.7)
        axes.annotate(
            f"{s.peak / MIB:.0f}", (s.peak / MIB, place), (5, 0), textcoords="offset points", va="center"
        )
    axes.margins(x=0.1)
    axes.set_xlabel("peak resident MiB of a rank")


def _tint(s: Summary) -> str:
    return _TINTS[s.row.partition(":")[0]]
