"""What was measured in the last optimizer step: loss, rates, norms, memory."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from deepspeed import comm
from deepspeed.accelerator import get_accelerator
from deepspeed.common.timers import ThroughputTimer
from deepspeed.engine.feature import Feature
from deepspeed.zero.stage import RankGroup

if TYPE_CHECKING:
    from deepspeed.engine.engine import DeepSpeedEngine


@dataclass(frozen=True)
class Measured:
    """One optimizer step.

    Attributes:
        loss: mean over ranks and over micro-batches since the previous measurement; None where
            ``engine.backward`` saw none.
        lr: of the first param group.
        grad_norm: before clipping; None where the step had no gradients.
        samples_per_s: over all ranks, since the previous measurement.
        memory_gib: in use on this rank (device memory, or resident memory on a host).
    """

    loss: float | None
    lr: float
    loss_scale: float
    grad_norm: float | None
    samples_per_s: float
    memory_gib: float


class StepMetrics(Feature):
    """Collect the losses of a step's micro-batches; other features ask for the result with `measure`."""

    def __init__(self, data_parallel: RankGroup) -> None:
        self._data_parallel = data_parallel
        self._loss_sum: Tensor | None = None
        self._losses = 0
        self._samples_before = 0
        self._since = time.perf_counter()
        self._measured: Measured | None = None

    def backward_start(self, engine: DeepSpeedEngine, loss: Tensor) -> None:
        value = loss.detach().float().reshape(())
        self._loss_sum = value if self._loss_sum is None else self._loss_sum + value
        self._losses += 1

    def step_end(self, engine: DeepSpeedEngine) -> None:
        self._measured = None

    def measure(self, engine: DeepSpeedEngine) -> Measured:
        """Return this step's numbers; every rank must ask, in the same step."""
        if self._measured is None:
            now = time.perf_counter()
            samples = engine.global_samples - self._samples_before
            self._measured = Measured(
                loss=self._mean_loss(),
                lr=engine.get_lr()[0],
                loss_scale=engine.cur_scale,
                grad_norm=engine.get_global_grad_norm(),
                samples_per_s=samples / max(now - self._since, 1e-9),
                memory_gib=get_accelerator().memory_allocated() / 2**30,
            )
            self._samples_before, self._since = engine.global_samples, now
            self._loss_sum, self._losses = None, 0
        return self._measured

    def _mean_loss(self) -> float | None:
        if self._loss_sum is None:
            return None
        mean = self._loss_sum / self._losses
        if self._data_parallel.size > 1:
            comm.all_reduce(mean, group=self._data_parallel.process_group)
            mean /= self._data_parallel.size
        return float(mean)


class Throughput(Feature):
    """Time each step from its first forward to its end for `engine.tput_timer`, without waiting for the device."""

    def __init__(self, timer: ThroughputTimer) -> None:
        self._timer = timer

    def forward_start(self, engine: DeepSpeedEngine) -> None:
        if engine.training and not self._timer.started:
            self._timer.start()

    def step_end(self, engine: DeepSpeedEngine) -> None:
        self._timer.batch_size = engine.train_batch_size() or 1
        self._timer.stop(global_step=True)
