"""Send the numbers of each step to TensorBoard, Weights & Biases, CSV files or Comet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from deepspeed.engine.feature import Feature
from deepspeed.engine.features.metrics import StepMetrics
from deepspeed.monitor import Monitor

if TYPE_CHECKING:
    from deepspeed.engine.engine import DeepSpeedEngine


class Monitoring(Feature):
    """Write events named ``Train/Samples/...`` over the number of samples seen."""

    def __init__(self, metrics: StepMetrics, monitors: Sequence[Monitor]) -> None:
        self._metrics = metrics
        self._monitors = monitors

    def step_end(self, engine: DeepSpeedEngine) -> None:
        measured = self._metrics.measure(engine)
        values = {
            "train_loss": measured.loss,
            "lr": measured.lr,
            "loss_scale": measured.loss_scale,
            "grad_norm": measured.grad_norm,
            "samples_per_sec": measured.samples_per_s,
            "memory_gib": measured.memory_gib,
        }
        events = [
            (f"Train/Samples/{name}", float(value), engine.global_samples)
            for name, value in values.items()
            if value is not None
        ]
        for monitor in self._monitors:
            monitor.write(events)

    def close(self) -> None:
        for monitor in self._monitors:
            monitor.close()
