"""Where time and memory go: forward, backward, step."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from torch import Tensor

from deepspeed.accelerator import get_accelerator
from deepspeed.common.logging import announce
from deepspeed.engine.feature import Feature

if TYPE_CHECKING:
    from deepspeed.engine.engine import DeepSpeedEngine


class TimeBreakdown(Feature):
    """Time forward, backward and step, the device included, and print them after each optimizer step (ms)."""

    def __init__(self) -> None:
        self._spent = {"forward": 0.0, "backward": 0.0, "step": 0.0}
        self._started = 0.0

    def forward_start(self, engine: DeepSpeedEngine) -> None:
        self._start()

    def forward_end(self, engine: DeepSpeedEngine) -> None:
        self._stop("forward")

    def backward_start(self, engine: DeepSpeedEngine, loss: Tensor) -> None:
        self._start()

    def backward_end(self, engine: DeepSpeedEngine) -> None:
        self._stop("backward")

    def step_start(self, engine: DeepSpeedEngine) -> None:
        self._start()

    def step_end(self, engine: DeepSpeedEngine) -> None:
        self._stop("step")
        parts = " | ".join(f"{name} {seconds * 1e3:.2f} ms" for name, seconds in self._spent.items())
        announce(f"time of step {engine.global_steps}: {parts}")
        self._spent = dict.fromkeys(self._spent, 0.0)

    def _start(self) -> None:
        get_accelerator().synchronize()
        self._started = time.perf_counter()

    def _stop(self, name: str) -> None:
        get_accelerator().synchronize()
        self._spent[name] += time.perf_counter() - self._started


class MemoryBreakdown(Feature):
    """Print the memory in use after forward, backward and step (GiB)."""

    def forward_end(self, engine: DeepSpeedEngine) -> None:
        self._show("forward")

    def backward_end(self, engine: DeepSpeedEngine) -> None:
        self._show("backward")

    def step_end(self, engine: DeepSpeedEngine) -> None:
        self._show("step")

    def _show(self, moment: str) -> None:
        accelerator = get_accelerator()
        now, peak = accelerator.memory_allocated() / 2**30, accelerator.max_memory_allocated() / 2**30
        announce(f"memory after {moment}: {now:.3f} GiB, peak {peak:.3f} GiB")
