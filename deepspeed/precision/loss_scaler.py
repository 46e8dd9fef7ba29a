"""Loss scaling: keep small fp16 gradients from vanishing, and back off when large ones overflow.

Source: Mixed Precision Training (arXiv 1710.03740), section 3.2.
"""

from __future__ import annotations

from typing import Any, Protocol

from deepspeed.errors import LossScaleError


class Fp16Settings(Protocol):
    """The keys of the ``fp16`` section that decide on the scale."""

    loss_scale: float
    initial_scale_power: int
    loss_scale_window: int
    hysteresis: int
    consecutive_hysteresis: bool
    min_loss_scale: float


class StaticLossScaler:
    """A scale that never changes; an overflow only skips its step."""

    dynamic = False

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = float(scale)

    def update(self, overflow: bool, culprit: str | None = None) -> None:
        """Take note of a step; nothing changes."""

    def state_dict(self) -> dict[str, Any]:
        """Return the scale, for a dynamic scaler that continues from it."""
        return {"scale": self.scale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep the configured scale, whatever was saved."""


class DynamicLossScaler:
    """A scale that doubles after a window of clean steps and halves at overflows.

    Args:
        scale: the first scale.
        window: clean steps in a row before the scale doubles.
        hysteresis: the scale halves at this many overflows; the ones before only skip their step.
        consecutive_hysteresis: a clean step restores the full tolerance; otherwise only a doubling does.
        min_scale: the scale never goes below; an overflow there is an error.
    """

    dynamic = True

    def __init__(
        self,
        scale: float = 2.0**16,
        *,
        window: int = 1000,
        hysteresis: int = 2,
        consecutive_hysteresis: bool = False,
        min_scale: float = 1.0,
    ) -> None:
        self.scale = float(scale)
        self.window = window
        self.hysteresis = hysteresis
        self.consecutive_hysteresis = consecutive_hysteresis
        self.min_scale = float(min_scale)
        self._tolerance = hysteresis
        self._clean_steps = 0

    def update(self, overflow: bool, culprit: str | None = None) -> None:
        """Adapt the scale to the outcome of a step.

        Args:
            overflow: whether a gradient was inf or nan.
            culprit: name of the first parameter with such a gradient, for the error.

        Raises:
            LossScaleError: an overflow at the smallest scale.
        """
        if overflow:
            self._back_off(culprit)
            return
        self._clean_steps += 1
        if self.consecutive_hysteresis:
            self._tolerance = self.hysteresis
        if self._clean_steps % self.window == 0:
            self.scale *= 2
            self._tolerance = self.hysteresis

    def _back_off(self, culprit: str | None) -> None:
        self._clean_steps = 0
        if self._tolerance > 1:
            self._tolerance -= 1
            return
        if self.scale <= self.min_scale:
            where = f"; the first such gradient on this rank is that of {culprit!r}" if culprit else ""
            raise LossScaleError(
                f"fp16.min_loss_scale: gradients are not finite although the loss scale is at its minimum "
                f"{self.min_scale:g}{where}. Lower the learning rate, look at the data, or train in bf16"
            )
        self.scale = max(self.scale / 2, self.min_scale)

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs."""
        return {"scale": self.scale, "tolerance": self._tolerance, "clean_steps": self._clean_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where another scaler stopped."""
        self.scale = float(state["scale"])
        self._tolerance = int(state.get("tolerance", self.hysteresis))
        self._clean_steps = int(state.get("clean_steps", 0))


LossScaler = StaticLossScaler | DynamicLossScaler


def create_loss_scaler(fp16: Fp16Settings, *, enabled: bool) -> LossScaler:
    """Make the scaler that the ``fp16`` section describes; where it is not `enabled` the scale is 1."""
    if not enabled:
        return StaticLossScaler()
    if fp16.loss_scale > 0:
        return StaticLossScaler(fp16.loss_scale)
    return DynamicLossScaler(
        2.0**fp16.initial_scale_power,
        window=fp16.loss_scale_window,
        hysteresis=fp16.hysteresis,
        consecutive_hysteresis=fp16.consecutive_hysteresis,
        min_scale=fp16.min_loss_scale,
    )
