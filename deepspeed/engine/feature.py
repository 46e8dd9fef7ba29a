"""Features: what joins the engine at named moments (timers, monitors, progress) without an `if` inside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from deepspeed.engine.engine import DeepSpeedEngine


class Feature:
    """Base of features: every moment does nothing unless overridden."""

    def forward_start(self, engine: DeepSpeedEngine) -> None:
        """Before the module's forward."""

    def forward_end(self, engine: DeepSpeedEngine) -> None:
        """After the module's forward."""

    def backward_start(self, engine: DeepSpeedEngine, loss: Tensor) -> None:
        """Before backward; `loss` is as the user gave it (0-dim)."""

    def backward_end(self, engine: DeepSpeedEngine) -> None:
        """After backward and its reductions."""

    def step_start(self, engine: DeepSpeedEngine) -> None:
        """Before an optimizer step; only at accumulation boundaries."""

    def step_end(self, engine: DeepSpeedEngine) -> None:
        """After an optimizer step; counters and schedule have moved on."""

    def close(self) -> None:
        """The engine is being destroyed."""
