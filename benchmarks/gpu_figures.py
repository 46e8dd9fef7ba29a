"""Figures of rows on a device: utilisation, memory, bandwidth of the update, the profile, and their goals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from comparison_goals import Verdict
from comparison_table import Summary, times
from model import GPT, Shape
from results import markdown_table

SPEED = 1.1
UTILISATION, UTILISATION_ON = 0.5, "H200"
UPDATE = 0.85
WAITS = 1.0  # of a step without offload: whether it was skipped is read once
GIB = 2**30
BYTES = 28
"""Of an update, for an element: gradient and bf16 weight 2 each; master and both moments 4 each, read and written."""

COMPILED = "+compile"
OFFLOADS = ("host",)


@dataclass(frozen=True)
class Figures:
    """A row's summary beside what only a device has; None where there is no figure.

    Attributes:
        utilisation: share of the device's peak that the model's own operations take.
        device_peak: bytes of tensors on the device.
        update_share: bytes that the fused update has to move, by the time of the whole step of the optimizer, by the
            bandwidth of a copy; None where the update runs elsewhere.
        use: of the profile, as gpu_trace.DeviceUse has it.
    """

    summary: Summary
    utilisation: float | None
    device_peak: float | None
    update_share: float | None
    use: Mapping[str, Any] | None

    @property
    def row(self) -> str:
        return self.summary.row

    @property
    def is_offloaded(self) -> bool:
        return is_offloaded(self.row)


@dataclass(frozen=True)
class Update:
    """The fused update of one leaf alone: its elements, seconds and form, and the bytes a second of a copy there."""

    numel: int
    seconds: float
    path: str
    copy: float

    @property
    def bandwidth(self) -> float:
        """Bytes a second that the update has to move."""
        return BYTES * self.numel / self.seconds

    @property
    def share(self) -> float:
        """Bandwidth of the update by that of a copy."""
        return self.bandwidth / self.copy


def is_offloaded(row: str) -> bool:
    """Tell whether a row keeps states off the device."""
    return row.removesuffix(COMPILED).rpartition(":")[2] in OFFLOADS


def flops_of_token(shape: Shape) -> float:
    """Count a model's operations for one token, forward and backward: 6 a multiplied weight, and attention.

    Tables of embeddings multiply nothing. Causal attention multiplies each position with half of the sequence, twice in
    forward (scores and values) and four times in backward. What runs again for checkpointing does not count.
    """
    return 6.0 * multiplied_weights(shape) + 6.0 * shape.layers * shape.seq * shape.dim


def multiplied_weights(shape: Shape) -> int:
    """Count a model's parameters without its two tables of embeddings."""
    with torch.device("meta"):
        model = GPT(shape)
    tables = (model.tokens.weight, model.positions.weight)
    return sum(p.numel() for p in model.parameters()) - sum(table.numel() for table in tables)


def render(figures: Sequence[Figures]) -> str:
    """Lay out the table; a dash where a figure makes no sense."""
    titles = (
        "row", "step ms", "min-max", "fwd", "bwd", "upd", "tokens/s", "MFU", "peak GiB", "host GiB", "upd of copy",
        "x original", "x without", "last loss", "1st step s",
    )  # fmt: skip
    return markdown_table(titles, [_cells(one) for one in figures])


def _cells(one: Figures) -> list[str]:
    s = one.summary
    return [
        s.label,
        f"{s.total * 1e3:.1f}",
        f"{s.fastest * 1e3:.1f}-{s.slowest * 1e3:.1f}",
        *(f"{s.phases[phase] * 1e3:.1f}" for phase in ("forward", "backward", "step")),
        f"{s.tokens_per_second:,.0f}",
        _percent(one.utilisation),
        "-" if one.device_peak is None else f"{one.device_peak / GIB:.1f}",
        f"{s.peak / GIB:.1f}",
        _percent(one.update_share),
        times(s.against_original),
        times(s.against_resident),
        f"{s.last_loss:.4f}",
        f"{s.first_step:.1f}",
    ]


def render_profile(figures: Sequence[Figures]) -> str:
    """Lay out what the profiler saw of a step."""
    titles = (
        "row",
        "copied MiB",
        "pinned",
        "apart",
        "hidden",
        "stream waits",
        "device waits",
        "event waits",
        "items",
    )
    return markdown_table(titles, [_profile_cells(one) for one in figures if one.use is not None])


def _profile_cells(one: Figures) -> list[str]:
    use = one.use or {}
    names = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "aten::item")
    return [
        one.summary.label,
        f"{use['copied'] / 2**20:.0f}" if use["copied"] else "-",
        *(_percent(use[name]) for name in ("pinned", "apart", "hidden")),
        *(f"{use['waits'].get(name, 0.0):g}" for name in names),
    ]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def verdicts(figures: Sequence[Figures], update: Update | None, device: str) -> list[Verdict]:
    """Hold this project's rows on a GPU against the goals."""
    ours = [one for one in figures if one.row.startswith("ours")]
    found = [verdict for one in ours for verdict in (*_speed(one, device), *_profile(one))]
    if update is not None:
        text = f"Fused update: {update.share:.2f} of the bandwidth of a copy"
        found.append(Verdict("update", "of copy", update.share, UPDATE, text))
    return found


def _speed(one: Figures, device: str) -> list[Verdict]:
    name, found = one.summary.label, []
    ratio = one.summary.against_original
    if ratio is not None:
        text = f"{name}: {ratio:.2f} times the original's tokens a second"
        found.append(Verdict(one.row, "x original", ratio, SPEED, text))
    due = one.row.endswith(COMPILED) and not one.is_offloaded and UTILISATION_ON in device
    if due and one.utilisation is not None:
        text = f"{name}: {one.utilisation:.2f} of the device's peak"
        found.append(Verdict(one.row, "MFU", one.utilisation, UTILISATION, text))
    return found


def _profile(one: Figures) -> list[Verdict]:
    use = one.use
    if use is None:
        return []
    name = one.summary.label
    if not one.is_offloaded:
        count = sum(value for call, value in use["waits"].items() if call != "aten::item")
        text = f"{name}: the host waits for the device {count:g} times a step"
        return [Verdict(one.row, "waits", count, WAITS, text, at_most=True)]
    says: dict[str, Callable[[float], str]] = {
        "pinned": lambda share: f"{name}: {share:.2f} of the time of copies is of pinned memory",
        "apart": lambda share: f"{name}: {share:.2f} of the time of copies is on a stream of their own",
    }
    return [
        Verdict(one.row, word, use[word], 1.0, say(use[word]))
        for word, say in says.items()
        if use[word] is not None
    ]
