"""The picture of a sweep: GB/s by pieces in flight, a line for each block size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deepspeed.common.commands import in_words
from deepspeed.offload.tools.sweep import Result


def draw(results: Sequence[Result], chosen: Result, title: str, path: Path) -> None:
    """Save the picture as PNG; `chosen` is marked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ways = [way for way in ("write", "read") if getattr(chosen, way) is not None]
    figure, panels = pyplot.subplots(
        1, len(ways), figsize=(5 * len(ways), 3.6), sharey=True, squeeze=False, layout="constrained"
    )
    figure.suptitle(title, fontsize=11)
    for way, axes in zip(ways, panels[0], strict=True):
        _draw_way(axes, way, results, chosen)
    panels[0][0].set_ylabel("GB/s")
    panels[0][0].set_ylim(bottom=0)
    panels[0][-1].legend(title="block", fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _draw_way(axes: Any, way: str, results: Sequence[Result], chosen: Result) -> None:
    for block in sorted({result.setting.block_size for result in results}):
        points = sorted(
            (_pieces(result), getattr(result, way) / 1e9)
            for result in results
            if result.setting.block_size == block
        )
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=in_words(block))
    axes.plot(
        _pieces(chosen),
        getattr(chosen, way) / 1e9,
        marker="o",
        markersize=11,
        color="black",
        fillstyle="none",
    )
    axes.set_xscale("log", base=2)
    axes.set_title(way, fontsize=10)
    axes.set_xlabel("pieces in flight (queue depth x threads)")
    axes.grid(color="#e5e7eb")
    axes.spines[["top", "right"]].set_visible(False)


def _pieces(result: Result) -> int:
    return result.setting.queue_depth * result.setting.threads
