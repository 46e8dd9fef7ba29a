"""What a trace of torch's profiler says of a device: are copies pinned, apart and hidden; where does the host wait.

A trace is the list of events of a file that `torch.profiler` exports: times in microseconds, `args` with the stream and
the bytes. Steps are marked by annotations whose names begin with MARK.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

MARK = "phase "
SMALL = 2**16
"""Bytes below which a copy is none of offload: a flag, a loss, a few numbers."""

WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
READS = "aten::item"
Event = dict[str, Any]
Span = tuple[float, float]


@dataclass(frozen=True)
class DeviceUse:
    """What a traced step does, besides computing.

    Attributes:
        copied: bytes between host and device, small copies left out.
        pinned: share of the time of these copies whose memory on the host is pinned.
        apart: share that runs on another stream than most kernels do.
        hidden: share during which some kernel runs.
        waits: calls in which the host waits for the device, and reads of single values, by name.
    """

    copied: float
    pinned: float | None
    apart: float | None
    hidden: float | None
    waits: dict[str, float] = field(default_factory=dict)

    @property
    def count(self) -> float:
        """Calls in which the host waits for the device."""
        return sum(self.waits.get(name, 0.0) for name in WAITS)


def read_trace(events: Sequence[Event], steps: int) -> DeviceUse:
    """Read the trace of `steps` steps."""
    kernels = [event for event in events if event.get("cat") == "kernel"]
    copies = [event for event in events if _is_copy(event)]
    main = _busiest_stream(kernels)
    busy = merged(_span(kernel) for kernel in kernels)
    return DeviceUse(
        copied=sum(_bytes(copy) for copy in copies) / steps,
        pinned=_share(copies, lambda copy: _length(copy) * ("Pinned" in copy["name"])),
        apart=_share(copies, lambda copy: _length(copy) * (_stream(copy) != main)),
        hidden=_share(copies, lambda copy: covered(_span(copy), busy)),
        waits={name: count / steps for name, count in _waits(events).items()},
    )


def merged(spans: Iterable[Span]) -> list[Span]:
    """Join spans that touch, in order."""
    found: list[Span] = []
    for start, stop in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(stop, found[-1][1]))
        else:
            found.append((start, stop))
    return found


def covered(span: Span, others: Sequence[Span]) -> float:
    """How much of a span lies within others that do not overlap."""
    return sum(max(0.0, min(span[1], stop) - max(span[0], start)) for start, stop in others)


def _is_copy(event: Event) -> bool:
    return event.get("cat") == "gpu_memcpy" and "DtoD" not in event["name"] and _bytes(event) >= SMALL


def _busiest_stream(kernels: Sequence[Event]) -> int | None:
    time: dict[int, float] = defaultdict(float)
    for kernel in kernels:
        time[_stream(kernel)] += _length(kernel)
    return max(time, key=lambda stream: time[stream], default=None)


def _waits(events: Sequence[Event]) -> Counter[str]:
    """Count the waits within marked phases; between steps the benchmark itself reads the loss."""
    phases = [
        _span(event)
        for event in events
        if event.get("cat") == "user_annotation" and event["name"].startswith(MARK)
    ]
    return Counter(
        event["name"]
        for event in events
        if event.get("name") in (*WAITS, READS)
        and any(start <= event["ts"] <= stop for start, stop in phases)
    )


def _share(copies: Sequence[Event], part: Any) -> float | None:
    whole = sum(_length(copy) for copy in copies)
    return sum(part(copy) for copy in copies) / whole if whole else None


def _span(event: Event) -> Span:
    return float(event["ts"]), float(event["ts"]) + _length(event)


def _length(event: Event) -> float:
    return float(event.get("dur", 0.0))


def _stream(event: Event) -> int:
    return int(event["args"]["stream"])


def _bytes(event: Event) -> int:
    return int(event["args"].get("bytes", 0))
