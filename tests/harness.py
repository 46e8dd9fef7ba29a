"""Run a test body on several ranks: a pool of long-lived processes, one pool per world size and backend.

    @on_ranks(2)
    def test_sum():
        ...                      # runs on both ranks, torch.distributed is initialised

A failing rank reports its own traceback; a hung one is named and its pool is killed.
"""

from __future__ import annotations

import functools
import gc
import importlib
import logging
import multiprocessing as mp
import os
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest

GRACE_S = 3.0  # how long other ranks may take to finish once one has failed


class RankFailure(AssertionError):
    """One or more ranks failed; the message holds each rank's own traceback."""


def on_ranks(count: int, timeout: float = 120.0, backend: str = "gloo") -> Callable[[Callable], Callable]:
    """Run the decorated module-level test body on `count` ranks."""

    def decorate(body: Callable) -> Callable:
        @functools.wraps(body)
        def on_pool(*args: Any, **kwargs: Any) -> None:
            run_on_ranks(count, body, *args, timeout=timeout, backend=backend, **kwargs)

        return on_pool

    return decorate


def run_on_ranks(
    count: int, body: Callable, *args: Any, timeout: float = 120.0, backend: str = "gloo", **kwargs: Any
) -> None:
    """Run `body` (module-level, possibly decorated) on `count` ranks and raise what any of them raised."""
    key = count, backend
    pool = _pools.get(key)
    if pool is None:
        pool = _pools[key] = _Pool(count, backend)
    try:
        pool.run(body.__module__, body.__qualname__, args, kwargs, timeout)
    except BaseException:
        pool.kill()
        _pools.pop(key, None)
        raise


def run_to_their_end(ranks: list[Any], logs: list[Path], seconds: float) -> list[tuple[int, str]]:
    """Start processes that write to logs; return each one's exit code and what it said.

    Processes that hang for longer than `seconds` fail the test; none is left behind.
    """
    for process in ranks:
        process.start()
    until = time.monotonic() + seconds
    for process in ranks:
        process.join(max(0.0, until - time.monotonic()))
    hung = [rank for rank, process in enumerate(ranks) if process.exitcode is None]
    for process in ranks:
        process.kill()
        process.join()
    said = [log.read_text() for log in logs]
    assert not hung, f"ranks {hung} hang; they said {said}"
    return [(process.exitcode, text) for process, text in zip(ranks, said, strict=True)]


def close_pools() -> None:
    """End every pool; called once when the test session ends."""
    for pool in _pools.values():
        pool.kill()
    _pools.clear()


def free_port() -> int:
    """Return a TCP port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class _Pool:
    def __init__(self, count: int, backend: str) -> None:
        context = mp.get_context("spawn")
        port = free_port()
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(count):
            ours, theirs = context.Pipe()
            args = theirs, rank, count, port, sys.path, backend
            process = context.Process(target=_serve, args=args, daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, module: str, name: str, args: tuple, kwargs: dict, timeout: float) -> None:
        for pipe in self.pipes:
            pipe.send((module, name, args, kwargs))
        waiting = dict(enumerate(self.pipes))
        failures: dict[int, str] = {}
        deadline = time.monotonic() + timeout
        while waiting:
            ready = wait(list(waiting.values()), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for rank, pipe in list(waiting.items()):
                if pipe in ready:
                    del waiting[rank]
                    error = self._answer(rank, pipe)
                    if error is not None:
                        failures[rank] = error
                        deadline = min(deadline, time.monotonic() + GRACE_S)
        if failures:
            raise RankFailure("\n".join(f"--- rank {rank} ---\n{text}" for rank, text in failures.items()))
        if waiting:
            raise RankFailure(f"ranks {sorted(waiting)} did not finish within {timeout} s")

    def _answer(self, rank: int, pipe: Connection) -> str | None:
        try:
            return pipe.recv()  # type: ignore[no-any-return]
        except EOFError:
            self.processes[rank].join(1)
            return f"process died with exit code {self.processes[rank].exitcode}"

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        for pipe in self.pipes:
            pipe.close()


def _serve(pipe: Connection, rank: int, count: int, port: int, path: list[str], backend: str) -> None:
    """Body of a pool process: initialise the backend, then run jobs until the pipe closes."""
    sys.path[:] = path
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(count),
        LOCAL_WORLD_SIZE=str(count),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if backend == "shm":
        importlib.import_module("deepspeed.comm").register_shm()
    dist.init_process_group(backend, rank=rank, world_size=count)
    warnings.simplefilter("error")
    while True:
        try:
            module, name, args, kwargs = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        pipe.send(_run(module, name, args, kwargs))


def _run(module: str, name: str, args: tuple, kwargs: dict) -> str | None:
    import torch.distributed as dist

    logger = logging.getLogger("DeepSpeed")
    level, disabled = logger.level, logger.disabled
    try:
        target: Any = importlib.import_module(module)
        for part in name.split("."):
            target = getattr(target, part)
        getattr(target, "__wrapped__", target)(*args, **kwargs)
        gc.collect()
        dist.barrier()
        return None
    except BaseException:  # a rank reports whatever ended it, pytest's own exceptions included
        return traceback.format_exc()
    finally:
        logger.disabled = disabled
        logger.setLevel(level or logging.WARNING)  # which the first body to import the package has not set
        if "deepspeed.parallel.groups" in sys.modules:  # keeps the unit of the last engine
            sys.modules["deepspeed.parallel.groups"].axes.mpu = None
        for given in (*args, *kwargs.values()):
            if isinstance(given, pytest.MonkeyPatch):  # the rank's own copy, which nobody else undoes
                given.undo()


_pools: dict[tuple[int, str], _Pool] = {}
