"""One line every few steps on the first rank."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deepspeed.common.logging import announce
from deepspeed.engine.feature import Feature
from deepspeed.engine.features.metrics import StepMetrics

if TYPE_CHECKING:
    from deepspeed.engine.engine import DeepSpeedEngine


class Progress(Feature):
    """Print step, loss, learning rate, gradient norm and throughput every `every` optimizer steps."""

    def __init__(self, metrics: StepMetrics, every: float) -> None:
        self._metrics = metrics
        self._every = every

    def step_end(self, engine: DeepSpeedEngine) -> None:
        if engine.global_steps % self._every:
            return
        measured = self._metrics.measure(engine)
        loss = "-" if measured.loss is None else f"{measured.loss:.5g}"
        norm = "-" if measured.grad_norm is None else f"{measured.grad_norm:.4g}"
        announce(
            f"step {engine.global_steps}: loss {loss}, lr {measured.lr:.4g}, grad norm {norm}, "
            f"{measured.samples_per_s:.1f} samples/s, skipped {engine.skipped_steps}"
        )
