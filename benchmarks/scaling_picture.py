"""The picture of scaling: what a rank keeps and sends, over the number of ranks, beside the formulas."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

_TINTS = {1: "#c0562f", 2: "#1769aa", 3: "#2f8f5b"}
GB = 1e9


def draw(jobs: Sequence[Sequence[Any]], path: Path) -> None:
    """Save the picture of jobs, each its runs on more and more ranks, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = list(dict.fromkeys(rows[0].model for rows in jobs))
    figure, grid = pyplot.subplots(
        len(models), 2, figsize=(10, 1 + 3 * len(models)), squeeze=False, layout="constrained"
    )
    figure.suptitle("One rank of many, simulated; dashed: the formulas of ZeRO", fontsize=11)
    for (memory, traffic), model in zip(grid, models, strict=True):
        for rows in (rows for rows in jobs if rows[0].model == model):
            _draw_lines(memory, rows, [run.kept for run in rows], [run.expected_kept for run in rows])
            _draw_lines(traffic, rows, [run.moved for run in rows], [run.expected_moved for run in rows])
        memory.set_ylabel(f"{model}: GB kept by a rank")
        memory.set_yscale("log")
        traffic.set_ylabel(f"{model}: GB sent by a rank in a step")
        traffic.set_ylim(bottom=0)
        for axes in (memory, traffic):
            axes.set_xscale("log", base=2)
            axes.set_xticks([run.ranks for run in jobs[0]], [str(run.ranks) for run in jobs[0]])
            axes.set_xlabel("ranks")
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(color="#e5e7eb")
        memory.legend(frameon=False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _draw_lines(axes: Any, rows: Sequence[Any], ours: Sequence[float], formula: Sequence[float]) -> None:
    ranks, stage = [run.ranks for run in rows], rows[0].stage
    size = 12 - 3 * stage  # stages 1 and 2 lie on each other
    axes.plot(
        ranks,
        [one / GB for one in ours],
        color=_TINTS[stage],
        marker="o",
        markersize=size,
        label=f"stage {stage}",
    )
    axes.plot(ranks, [one / GB for one in formula], color=_TINTS[stage], linestyle="--", linewidth=1)
