"""Streams, events, graphs and named ranges of the device; on the CPU they exist and do nothing."""

from __future__ import annotations

import contextlib
import time
from typing import Any

from deepspeed.accelerator.devices import Devices


class HostEvent:
    """A point in time on the CPU, with the methods of a device event."""

    def __init__(self, **_: Any) -> None:
        self._seconds = 0.0

    def record(self, stream: Any = None) -> None:
        """Take the time."""
        self._seconds = time.perf_counter()

    def wait(self, stream: Any = None) -> None:
        """Return at once: what was recorded before is done."""

    def synchronize(self) -> None:
        """Return at once: what was recorded before is done."""

    def query(self) -> bool:
        """Tell that what was recorded before is done."""
        return True

    def elapsed_time(self, later: HostEvent) -> float:
        """Return the milliseconds from this event to `later`."""
        return (later._seconds - self._seconds) * 1e3


class Streams(Devices):
    """Order of work on the device."""

    @property
    def Stream(self) -> Any:
        """The class of streams."""
        return self.module.Stream

    @property
    def Event(self) -> Any:
        """The class of events."""
        return HostEvent if self.on_host else self.module.Event

    def stream(self, stream: Any) -> Any:
        """Return a context inside which work goes to `stream`."""
        return self.module.stream(stream)

    def current_stream(self, device_index: int | None = None) -> Any:
        """Return the stream that work goes to now."""
        return self.module.current_stream() if self.on_host else self.module.current_stream(device_index)

    def default_stream(self, device_index: int | None = None) -> Any:
        """Return the stream that work goes to unless told otherwise."""
        return self.module.current_stream() if self.on_host else self.module.default_stream(device_index)

    def range_push(self, message: str) -> None:
        """Open a named range in a profile."""
        if self.kind == "cuda":
            self.module.nvtx.range_push(message)

    def range_pop(self) -> None:
        """Close the range opened last."""
        if self.kind == "cuda":
            self.module.nvtx.range_pop()

    def create_graph(self) -> Any:
        """Return an empty graph of device work, or None where there are none."""
        return self.module.CUDAGraph() if self.kind == "cuda" else None

    def capture_to_graph(self, graph: Any, pool: Any = None, stream: Any = None) -> Any:
        """Return a context that records device work into `graph`."""
        if self.kind != "cuda":
            return contextlib.nullcontext()
        return self.module.graph(graph, pool=pool, stream=stream)

    def replay_graph(self, graph: Any) -> None:
        """Run what `graph` recorded."""
        if graph is not None:
            graph.replay()
