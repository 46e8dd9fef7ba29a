"""A look at what this rank waits for, when it has waited for long.

Note [Standstill]
    Ranks that wait in different calls wait for ever, and nothing that they wait in can say so: a barrier of
    torch's is not interrupted, and does not know what the others do. So a thread looks once a second at where
    the main thread is. Nothing is recorded by the calls themselves. Once a wait has lasted some looks, it is
    published in the store that the ranks met at; when all ranks of the job wait, what they published is
    compared. A rank in a call waits for the members of its group that are in another call; where that leads in
    a circle, and still does at the next look, nobody can go on. All ranks then say who is where, and end.

        rank 0   reduce_scatter_single: gradients of h.3 (backward at train.py:31)    waits for 1
        rank 1   torch.distributed.barrier (barrier at train.py:40)                   waits for 0

    One rank that computes, loads, compiles or sleeps, however long, and the others are in no standstill. Nor
    are ranks that wait in the same call: there torch's own timeout counts. Nor are they while data is on its
    way: a rank that has its part of a broadcast goes on to the next call, and one that has not may wait long
    for a slow network. So a rank that writes is not counted as waiting, and where ranks do not share memory they
    have to wait longer, as a network may pause. Calls that a device runs by itself are not seen.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from deepspeed.comm import direct, exchanges, hosts, links, neighbours
from deepspeed.comm.calls import place, readable

SECOND = 1.0  # between two looks
LONG = 3  # looks after which a wait is published where all ranks share memory
PAUSE = 30  # and where they do not: a network may be silent for as long, and go on
QUIET = 2**16  # bytes written between two looks: with more, data is on its way
IDLE = (
    5e-5  # seconds of work in which no rank can end a call and begin another: less between looks is one wait
)
TORCHS = frozenset(distributed_c10d.__all__) - {
    "send",
    "recv",
    "isend",
    "irecv",
    "batch_isend_irecv",
    "new_group",
}
_IO = Path("/proc/self/io")
ACROSS = frozenset({hosts.GatherAcross.wait.__code__, hosts.ReduceAcross.wait.__code__})
"""Waits of two halves, in which ranks of one call may be in different ones."""


@dataclass(frozen=True)
class Wait:
    """A call that a rank waits in."""

    what: str
    ranks: tuple[int, ...]
    """Global ranks of its group."""
    where: str = ""
    number: int = 0
    """Of the call in its group, where ranks count them."""
    time: int = 0
    """Tells the waits that a rank publishes apart."""

    def is_with(self, other: Wait) -> bool:
        """Tell whether both are in the same call."""
        return (self.what, self.ranks, self.number) == (other.what, other.ranks, other.number)


def watch() -> None:
    """Begin to look, once for a process and its default group; ends with the group or the process."""
    if not dist.is_initialized() or dist.get_world_size() == 1 or not hasattr(time, "pthread_getcpuclockid"):
        return
    world = dist.group.WORLD
    name = f"deepspeed-standstill-{id(world)}"
    if any(thread.name == name for thread in threading.enumerate()):
        return
    try:
        store: Any = distributed_c10d._get_default_store()
        store = store.clone()
    except RuntimeError:  # this kind cannot be used beside the main thread
        return
    stop = threading.Event()
    thread = threading.Thread(target=_look, args=(store, world, stop), name=name, daemon=True)

    def end() -> None:  # a thread inside the store would abort a process that finalises
        stop.set()
        thread.join(2 * SECOND)

    atexit.register(end)
    thread.start()


def _look(store: Any, world: Any, stop: threading.Event) -> None:
    """Body of the thread; a store that is gone ends it: then the job ends."""
    board = Board(
        distributed_c10d.PrefixStore("deepspeed/standstill", store), dist.get_rank(), dist.get_world_size()
    )
    main = threading.main_thread().ident or 0
    clock = time.pthread_getcpuclockid(main)
    still = Stillness(lambda: time.clock_gettime(clock), _written)
    before: dict[int, Wait] | None = None
    try:
        while not stop.wait(SECOND) and dist.is_initialized() and dist.group.WORLD is world:
            found = waiting(sys._current_frames().get(main))
            looks = still.looks(found)
            if found is None or looks < (LONG if neighbours.are_near(world) else PAUSE):
                board.clear()
                before = None
                continue
            board.publish(found)
            now = board.read()
            if now is not None and stuck(now) and (now == before or board.is_agreed):
                _say(now, sys._current_frames().get(main))
                board.agree(stop)
                os._exit(1)  # what the main thread waits in cannot be interrupted
            before = now
    except RuntimeError:
        return


class Stillness:
    """Counts the looks at which this rank waits in the same call, and sends nothing.

    Args:
        spent: seconds that the main thread has worked so far.
        written: bytes that the process has written so far.
    """

    def __init__(self, spent: Callable[[], float], written: Callable[[], int]) -> None:
        self._spent, self._written = spent, written
        self._before: tuple[Wait | None, float, int] = None, 0.0, 0
        self._looks = 0

    def looks(self, found: Wait | None) -> int:
        """Count one more look, at which the main thread was found in a wait or in none."""
        last, spent, written = self._before
        self._before = found, self._spent(), self._written()
        idle = self._before[1] - spent < IDLE or (found is not None and found.number > 0)
        quiet = self._before[2] - written < QUIET
        self._looks = self._looks + 1 if found is not None and found == last and idle and quiet else 0
        return self._looks


def _written() -> int:
    """Bytes that this process has written so far, to sockets too; 0 where the system does not tell."""
    try:
        return int(_IO.read_text().partition("wchar: ")[2].split()[0])
    except OSError:
        return 0


def waiting(frame: FrameType | None) -> Wait | None:
    """Find the call of all ranks of a group that a stack waits in.

    That is the one that the ranks have counted, unless it is a part of one among hosts; else the outermost one,
    as ranks would call it.
    """
    found = None
    step = frame
    while step is not None:
        if step.f_code in ACROSS or found is None or found.number == 0:
            found = _wait_in(step) or found
        step = step.f_back
    if found is None or frame is None:
        return None
    return replace(found, where=place(frame))


def _wait_in(frame: FrameType) -> Wait | None:
    """Read a frame's variables only if it is of such a call: reading keeps them until the frame ends."""
    code = frame.f_code
    if code is links.Links._wait_for.__code__:
        ours: links.Links = frame.f_locals["self"]
        call: int = frame.f_locals["call"]
        return Wait(ours.doing(call), tuple(ours.names), number=call)
    if code is neighbours._connect.__code__:
        return Wait(readable(neighbours.FIRST), _members(frame.f_locals["group"]))
    if code in ACROSS:
        work: hosts.GatherAcross | hosts.ReduceAcross = frame.f_locals["self"]
        return Wait(readable(work.what), _members(work.group))
    if code in (exchanges.elsewhere.__code__, direct.wait_all.__code__):
        return Wait(readable(frame.f_locals["what"]), _members(frame.f_locals["group"]))
    if frame.f_globals is vars(distributed_c10d) and code.co_name in TORCHS and "group" in code.co_varnames:
        return Wait(f"torch.distributed.{code.co_name}", _members(frame.f_locals["group"]))
    return None


def _members(group: Any) -> tuple[int, ...]:
    return tuple(dist.get_process_group_ranks(group or dist.group.WORLD))


def stuck(waits: Mapping[int, Wait]) -> set[int]:
    """Return the ranks that wait for each other, by what all ranks wait in."""
    found = set(waits)
    while True:
        rest = {
            rank
            for rank in found
            if any(other in found and not waits[rank].is_with(waits[other]) for other in waits[rank].ranks)
        }
        if rest == found:
            return found
        found = rest


class Board:
    """Where ranks publish their long waits, each its own, and count them."""

    def __init__(self, store: Any, rank: int, world: int) -> None:
        self._store, self._rank, self._world = store, rank, world
        self._published: Wait | None = None
        self._count = 0

    def publish(self, wait: Wait) -> None:
        """Show what this rank waits in."""
        if self._published is None:
            self._count += 1
            self._store.set(str(self._rank), json.dumps(asdict(replace(wait, time=self._count))))
            self._store.add("waiting", 1)
            self._published = wait

    def clear(self) -> None:
        """Take it back."""
        if self._published is not None:
            self._published = None
            self._store.add("waiting", -1)

    def read(self) -> dict[int, Wait] | None:
        """Return what all ranks wait in; None while one does not."""
        if self._store.add("waiting", 0) < self._world:
            return None
        texts = [json.loads(self._store.get(str(rank))) for rank in range(self._world)]
        return {rank: Wait(**{**text, "ranks": tuple(text["ranks"])}) for rank, text in enumerate(texts)}

    @property
    def is_agreed(self) -> bool:
        """Whether a rank has found a standstill."""
        return bool(self._store.add("seen", 0))

    def agree(self, stop: threading.Event) -> None:
        """Give the others time to see and say the same, before the store and the connections go."""
        self._store.add("seen", 1)
        for _ in range(2 * LONG):
            if self._store.add("seen", 0) >= self._world:
                return
            stop.wait(SECOND)


def _say(waits: Mapping[int, Wait], frame: FrameType | None) -> None:
    """Say who waits where, as an exception would."""
    said = ", ".join(
        f"rank {rank} is in {wait.what}" + (f" ({wait.where})" if wait.where else "")
        for rank, wait in sorted(waits.items())
    )
    stack = "".join(traceback.format_stack(frame))
    print(
        f"Where this rank waits (most recent call last):\n{stack}"
        f"deepspeed.errors.CommunicationError: ranks wait for each other: {said}; "
        "every rank must make the same calls in the same order",
        file=sys.stderr,
        flush=True,
    )
    sys.stdout.flush()
