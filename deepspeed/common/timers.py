"""Wall-clock timers that wait for the device, so that what they show was really done."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence

from deepspeed.accelerator import get_accelerator
from deepspeed.common.logging import announce, log_dist
from deepspeed.errors import UsageError


class Timer:
    """A stopwatch: intervals between `start` and `stop` add up until `reset`. Times are in milliseconds."""

    def __init__(self, name: str, *, synchronized: bool = True) -> None:
        self.name = name
        self._synchronized = synchronized
        self._started: float | None = None
        self._spent_ms = 0.0
        self._records: list[float] = []

    def start(self) -> None:
        """Begin an interval."""
        if self._started is not None:
            raise UsageError(f"timer {self.name!r}: expected stop before another start")
        self._started = self._now()

    def stop(self, reset: bool = False, record: bool = False) -> None:
        """End the interval: add it (with `reset`, replace by it), and with `record` keep it for `mean`."""
        if self._started is None:
            raise UsageError(f"timer {self.name!r}: expected start before stop")
        interval = (self._now() - self._started) * 1e3
        self._started = None
        self._spent_ms = interval if reset else self._spent_ms + interval
        if record:
            self._records.append(interval)

    def reset(self) -> None:
        """Stop, and forget everything measured."""
        self._started = None
        self._spent_ms = 0.0
        self._records.clear()

    def elapsed(self, reset: bool = True) -> float:
        """Return the milliseconds measured so far, an open interval included, and by default start anew."""
        running = self._started is not None
        if running:
            self.stop()
        spent = self._spent_ms
        if reset:
            self._spent_ms = 0.0
        if running:
            self.start()
        return spent

    def mean(self) -> float:
        """Return the mean of the recorded intervals (0 without any)."""
        return sum(self._records) / len(self._records) if self._records else 0.0

    def _now(self) -> float:
        if self._synchronized:
            get_accelerator().synchronize()
        return time.perf_counter()


class SynchronizedWallClockTimer:
    """Timers by name: ``timers("forward").start()``."""

    def __init__(self) -> None:
        self.timers: dict[str, Timer] = {}

    def __call__(self, name: str) -> Timer:
        if name not in self.timers:
            self.timers[name] = Timer(name)
        return self.timers[name]

    def get_timers(self) -> dict[str, Timer]:
        """Return all timers by name."""
        return self.timers

    def log(
        self,
        names: Sequence[str],
        normalizer: float = 1.0,
        reset: bool = True,
        memory_breakdown: bool = False,
        ranks: Collection[int] | None = None,
    ) -> None:
        """Print the milliseconds of the named timers over `normalizer`, on rank 0 or the given ranks."""
        parts = [
            f"{name}: {self.timers[name].elapsed(reset=reset) / normalizer:.2f}"
            for name in names
            if name in self.timers
        ]
        if memory_breakdown:
            parts.append(f"memory {get_accelerator().memory_allocated() / 2**30:.2f} GiB")
        log_dist(f"time (ms) | {' | '.join(parts)}", ranks=ranks or [0], level=30)

    def get_mean(self, names: Sequence[str], normalizer: float = 1.0, reset: bool = True) -> dict[str, float]:
        """Return the mean recorded interval of each named timer over `normalizer`."""
        means = {}
        for name in names:
            if name in self.timers:
                means[name] = self.timers[name].mean() / normalizer
                if reset:
                    self.timers[name].reset()
        return means


class ThroughputTimer:
    """Samples per second of all ranks together, the first `start_step` steps left out as warm-up.

    `batch_size` is the number of samples per step. With `steps_per_output`, every so many steps a line goes
    to `logging_fn`.
    """

    def __init__(
        self,
        batch_size: int,
        start_step: int = 2,
        steps_per_output: int | None = None,
        logging_fn: Callable[[str], None] = announce,
        *,
        synchronized: bool = True,
    ) -> None:
        self.batch_size = max(1, batch_size)
        self.start_step = start_step
        self.steps_per_output = steps_per_output
        self.logging = logging_fn
        self.global_step_count = 0
        self.epoch_count = 0
        self.total_elapsed_time = 0.0
        self._timer = Timer("throughput", synchronized=synchronized)
        self._running = False

    @property
    def started(self) -> bool:
        """Whether a micro-step has begun that has not ended."""
        return self._running

    def update_epoch_count(self) -> None:
        """Count an epoch; scripts call it at the end of each."""
        self.epoch_count += 1

    def start(self) -> None:
        """Begin a micro-step; a step may have several."""
        self._timer.start()
        self._running = True

    def stop(self, global_step: bool = False, report_speed: bool = True) -> None:
        """End the micro-step, and with `global_step` the step."""
        if not self._running:
            return
        self._running = False
        self._timer.stop()
        if not global_step:
            return
        seconds = self._timer.elapsed() / 1e3
        self.global_step_count += 1
        if self.global_step_count <= self.start_step:
            return
        self.total_elapsed_time += seconds
        every = self.steps_per_output
        if report_speed and every and self.global_step_count % every == 0:
            self.logging(f"step {self.global_step_count}: {self.avg_samples_per_sec():.2f} samples/s")

    def avg_samples_per_sec(self) -> float:
        """Return the mean samples per second of the steps after the warm-up (0 before any)."""
        steps = self.global_step_count - self.start_step
        return steps * self.batch_size / self.total_elapsed_time if steps > 0 else 0.0
