"""What happens where a checkpoint's forward, and its recomputation in backward, begin and end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Literal, Protocol

import torch
from torch.autograd import Variable

from deepspeed.accelerator import get_accelerator
from deepspeed.activation_checkpointing.random import CudaRNGStatesTracker, device_at
from deepspeed.common.timers import SynchronizedWallClockTimer

Moment = Literal["forward", "recompute"]


class Boundary(Protocol):
    """Something that surrounds every checkpoint."""

    def around(self, moment: Moment) -> AbstractContextManager[None]:
        """Return the context of one checkpoint's forward or recomputation."""


class Synchronize:
    """Waits for the device before and after."""

    @contextmanager
    def around(self, _moment: Moment) -> Iterator[None]:
        get_accelerator().synchronize()
        try:
            yield
        finally:
            get_accelerator().synchronize()


class Profile:
    """Adds up the time of all checkpoints, and logs a line when backward ends; inner ones count as the outer."""

    def __init__(self) -> None:
        self.timers = SynchronizedWallClockTimer()
        self._is_timing = False
        self._will_log = False

    @contextmanager
    def around(self, moment: Moment) -> Iterator[None]:
        if self._is_timing:
            yield
            return
        timer = self.timers(f"checkpoint {moment}")
        self._is_timing = True
        timer.start()
        try:
            yield
        finally:
            timer.stop()
            self._is_timing = False
            self._log_after_backward()

    def _log_after_backward(self) -> None:
        if not self._will_log and torch._C._current_graph_task_id() != -1:
            self._will_log = True
            Variable._execution_engine.queue_callback(self._log)

    def _log(self) -> None:
        self._will_log = False
        self.timers.log(list(self.timers.get_timers()))


class SameNumbers:
    """Lets a recomputation draw the random numbers of its forward.

    The CPU's generator and those of the inputs' devices are left to torch. This replays the tracker's
    streams, and the current device's for functions whose inputs are all on the CPU.
    """

    def __init__(self, tracker: CudaRNGStatesTracker) -> None:
        self._tracker = tracker
        self._streams = tracker.get_states()
        self._device = None if get_accelerator().on_host else get_accelerator().get_rng_state()

    @contextmanager
    def around(self, moment: Moment) -> Iterator[None]:
        if moment == "forward":
            yield
            return
        device = nullcontext() if self._device is None else device_at(self._device)
        with device, self._tracker.replayed(self._streams):
            yield


class Surrounded:
    """The contexts of several boundaries as one, which may be entered again: backward may run twice."""

    def __init__(self, boundaries: list[Boundary], moment: Moment) -> None:
        self._boundaries, self._moment = boundaries, moment
        self._leave: Callable[..., Any] = ExitStack().__exit__

    def __enter__(self) -> None:
        with ExitStack() as stack:
            for boundary in self._boundaries:
                stack.enter_context(boundary.around(self._moment))
            self._leave = stack.pop_all().__exit__

    def __exit__(self, *error: Any) -> Any:
        return self._leave(*error)
