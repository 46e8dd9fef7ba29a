"""Measurements of a running training: loss, speed and memory, over all ranks."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from deepspeed import DeepSpeedEngine, get_accelerator
from gpt.progress import Status
from gpt.ranks import gather_row

BITS = 1 / math.log(2)  # in one nat


class Pace:
    """Collects micro-batches between two statuses; only `status` waits for the device."""

    def __init__(self, engine: DeepSpeedEngine, steps: int, deadline: float) -> None:
        self.engine = engine
        self.steps = steps
        self.deadline = deadline  # on the clock of time.monotonic
        self._last_step = 0
        self.restart()

    def restart(self) -> None:
        """Forget what was collected and start the clock."""
        self._losses: list[Tensor] = []
        self._tokens = 0
        self._start = time.monotonic()

    def saw(self, loss: Tensor, tokens: int) -> None:
        """Collect one micro-batch."""
        self._losses.append(loss.detach())
        self._tokens += tokens

    def status(self, step: int) -> Status:
        """Return how things stand after `step`; every rank must call it."""
        mean_loss = float(torch.stack(self._losses).mean())
        now = time.monotonic()
        elapsed = now - self._start
        memory = float(get_accelerator().max_memory_allocated())
        late = float(now > self.deadline)
        rows = gather_row([mean_loss, float(self._tokens), memory, late], self.engine.device)
        loss = float(rows[:, 0].mean())
        all_steps = elapsed / (step - self._last_step) * (self.steps - step)
        status = Status(
            step=step,
            steps=self.steps,
            loss=loss,
            bits=loss * BITS,
            lr=self.engine.get_lr()[0],
            grad_norm=self.engine.get_global_grad_norm() or 0.0,
            tokens_per_s=float(rows[:, 1].sum()) / elapsed,
            memory=tuple(rows[:, 2].tolist()),
            seconds_left=max(0.0, min(all_steps, self.deadline - now)),
            last=step == self.steps or bool(rows[:, 3].any()),
        )
        self._last_step = step
        self.restart()
        return status
