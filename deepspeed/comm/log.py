"""Timing and counting of collectives: one decorator, which costs one attribute test while it is off.

algorithm bandwidth = bytes / time
bus bandwidth       = what the links carry for it: algorithm bandwidth times a factor of the operation
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from deepspeed.common.logging import logger
from deepspeed.errors import ConfigError, did_you_mean

Function = TypeVar("Function", bound=Callable[..., Any])

MEGABYTE = 2**20

OLD_NAMES = {"all_gather_into_tensor": "all_gather_single", "reduce_scatter_tensor": "reduce_scatter_single"}
"""What `prof_ops` may call operations that torch renamed."""


def bus_factor(op: str, world: int) -> float:
    """Return how many of an operation's bytes each link carries, as a share of the message size."""
    if op == "all_reduce":
        return 2 * (world - 1) / world
    if op.startswith(("all_gather", "reduce_scatter", "all_to_all")):
        return (world - 1) / world
    return 1.0


def nbytes(tensor: Tensor) -> int:
    """Return a tensor's size in bytes."""
    return tensor.numel() * tensor.element_size()


def total_nbytes(tensors: Iterable[Tensor]) -> int:
    """Return the size in bytes of several tensors."""
    return sum(nbytes(tensor) for tensor in tensors)


@dataclass
class Tally:
    """What one operation with one message size has cost so far."""

    world: int
    count: int = 0
    seconds: float = 0.0

    def bandwidth(self, size: int) -> float:
        """Return bytes per second over all calls (0 when nothing was measured)."""
        return size * self.count / self.seconds if self.seconds else 0.0


OPERATIONS: set[str] = set()
"""Names of the operations that can be counted; `logged` adds them."""


def _operation(name: str) -> str:
    """Return the present name of an operation, or of what several begin with."""
    found = OLD_NAMES.get(name, name)
    if not any(known.startswith(found) for known in OPERATIONS):
        raise ConfigError(
            f"comms_logger.prof_ops: expected names of operations ({', '.join(sorted(OPERATIONS))}), got "
            f"{name!r}{did_you_mean(name, OPERATIONS)}"
        )
    return found


class CommsLogger:
    """Counts and times collectives per operation and message size.

    `prof_ops` restricts it to the operations whose name starts with one of the given words, unless
    `prof_all`. `verbose` logs a line per call, and `debug` adds the calling function to it.
    """

    def __init__(self) -> None:
        self.enabled = False
        self.prof_all = True
        self.prof_ops: tuple[str, ...] = ()
        self.verbose = False
        self.debug = False
        self.tallies: dict[tuple[str, int], Tally] = {}

    def configure(
        self,
        *,
        enabled: bool | None = None,
        prof_all: bool | None = None,
        prof_ops: Iterable[str] | None = None,
        verbose: bool | None = None,
        debug: bool | None = None,
    ) -> None:
        """Change the given settings and keep the others."""
        if enabled is not None:
            self.enabled = enabled
        if prof_all is not None:
            self.prof_all = prof_all
        if prof_ops is not None:
            self.prof_ops = tuple(_operation(name) for name in prof_ops)
        if verbose is not None:
            self.verbose = verbose
        if debug is not None:
            self.debug = debug

    def reset(self) -> None:
        """Forget everything counted so far."""
        self.tallies.clear()

    def watches(self, op: str) -> bool:
        """Tell whether calls of `op` are counted."""
        return self.prof_all or op.startswith(self.prof_ops)

    def record(self, op: str, size: int, seconds: float, world: int, caller: str) -> None:
        """Count one call that moved `size` bytes in `seconds`."""
        tally = self.tallies.setdefault((op, size), Tally(world))
        tally.count += 1
        tally.seconds += seconds
        if self.verbose:
            where = f" | from {caller}" if self.debug else ""
            rate = size / seconds / 1e9 if seconds else 0.0
            logger.warning(f"comm {op} | {size} bytes | {seconds * 1e3:.3f} ms | {rate:.2f} GB/s{where}")

    def table(self, waiting: dict[tuple[str, int], float] | None = None) -> str:
        """Render the tallies; `waiting` adds a column of seconds spent waiting for slower ranks."""
        head = f"{'operation':<24}{'size':>12}{'count':>8}{'total ms':>12}{'mean ms':>10}{'algbw GB/s':>12}"
        lines = [head + f"{'busbw GB/s':>12}" + (f"{'waited ms':>12}" if waiting is not None else "")]
        for (op, size), tally in sorted(self.tallies.items()):
            rate = tally.bandwidth(size) / 1e9
            line = f"{op:<24}{_readable(size):>12}{tally.count:>8}{tally.seconds * 1e3:>12.2f}"
            line += f"{tally.seconds / tally.count * 1e3:>10.3f}{rate:>12.2f}"
            line += f"{rate * bus_factor(op, tally.world):>12.2f}"
            if waiting is not None:
                line += f"{waiting.get((op, size), 0.0) * 1e3:>12.2f}"
            lines.append(line)
        return "\n".join(lines)


comms_logger = CommsLogger()


def logged(op: str, size: Callable[..., int]) -> Callable[[Function], Function]:
    """Count and time the decorated collective under the name `op`; `size` maps its arguments to bytes."""
    OPERATIONS.add(op)

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def _call(*args: Any, **kwargs: Any) -> Any:
            if not comms_logger.enabled or not comms_logger.watches(op):
                return function(*args, **kwargs)
            return _timed(op, size(*args, **kwargs), function, args, kwargs)

        return _call  # type: ignore[return-value]

    return decorate


def _timed(
    op: str, size: int, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    group = kwargs.get("group")
    caller = sys._getframe(2).f_code.co_name if comms_logger.debug else ""
    _synchronize()
    started = time.perf_counter()
    result = function(*args, **kwargs)

    def record() -> None:
        _synchronize()
        world = max(1, dist.get_world_size(group))
        comms_logger.record(op, size, time.perf_counter() - started, world, caller)

    if isinstance(result, dist.Work):
        return TimedWork(result, record)
    record()
    return result


class TimedWork(dist.Work):
    """A work whose time is recorded when it has been waited for."""

    def __init__(self, work: Any, record: Callable[[], None]) -> None:
        super().__init__()
        self._work = work
        self._record: Callable[[], None] | None = record

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Wait for the operation, then count it once."""
        done = self._work.wait() if timeout is None else self._work.wait(timeout)
        if self._record is not None:
            self._record()
            self._record = None
        return bool(done)

    def is_completed(self) -> bool:
        """Tell whether the operation has ended."""
        return bool(self._work.is_completed())


def configure(
    deepspeed_config: Any = None,
    enabled: bool | None = None,
    prof_all: bool | None = None,
    prof_ops: Iterable[str] | None = None,
    verbose: bool | None = None,
    debug: bool | None = None,
) -> None:
    """Set up the logging of collectives, from a config with a ``comms_logger`` section or by keyword."""
    if isinstance(deepspeed_config, dict):
        comms_logger.configure(**deepspeed_config.get("comms_logger", {}))
    elif deepspeed_config is not None:
        section = deepspeed_config.comms_logger
        comms_logger.configure(
            enabled=section.enabled,
            prof_all=section.prof_all,
            prof_ops=section.prof_ops,
            verbose=section.verbose,
            debug=section.debug,
        )
    comms_logger.configure(
        enabled=enabled, prof_all=prof_all, prof_ops=prof_ops, verbose=verbose, debug=debug
    )


def log_summary(show_straggler: bool = False) -> None:
    """Print what collectives have cost so far, on rank 0.

    With `show_straggler`, which every rank must call, a column adds the time rank 0 spent waiting for
    slower ranks: its own time less that of the rank that waited least.
    """
    waiting = _waiting() if show_straggler else None
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(comms_logger.table(waiting), flush=True)


def _waiting() -> dict[tuple[str, int], float]:
    mine = {key: tally.seconds for key, tally in comms_logger.tallies.items()}
    everyone: list[Any] = [mine]
    if dist.is_initialized():
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
    return {key: spent - min(other.get(key, spent) for other in everyone) for key, spent in mine.items()}


def _synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def _readable(size: int) -> str:
    return f"{size / MEGABYTE:.2f} MB" if size >= MEGABYTE else f"{size / 1024:.2f} KB"
