"""The steps of the short examples: forward, backward, step, and a line now and then."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from torch import Tensor

from deepspeed import DeepSpeedEngine, comm
from gpt.pace import Pace
from gpt.progress import progress_for

EVERY = 5  # steps between two lines
AN_HOUR = 3600.0


def run_steps(
    engine: DeepSpeedEngine,
    batches: Iterator[tuple[Tensor, Tensor]],
    steps: int,
    loss_of: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Train on `steps` batches of (tokens, targets); `loss_of` runs the engine on one and returns the loss."""
    pace = Pace(engine, steps, time.monotonic() + AN_HOUR)
    with progress_for(comm.get_rank()) as progress:
        for step in range(1, steps + 1):
            tokens, targets = next(batches)
            loss = loss_of(tokens, targets)
            engine.backward(loss)
            engine.step()
            pace.saw(loss, tokens.numel())
            if step == 1 or step % EVERY == 0 or step == steps:
                progress.show(pace.status(step))
