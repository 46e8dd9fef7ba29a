"""One rank: `python -m deepspeed.launcher.rank TASK TARGET ARGUMENTS`, started by torch's agent.

The process forks: above stays the guard, below runs the user's script.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections import deque
from pathlib import Path
from typing import NamedTuple

from deepspeed.launcher import record, script
from deepspeed.launcher.guard import Guard, die_with, signals_held
from deepspeed.launcher.record import Record

STDERR = 2
TAIL_LINES = 30
UNNOTICED = 1.0
"""Seconds a busy machine may take to tell the guard of a death; peers that lose the rank may speak before."""


class Task(NamedTuple):
    """What the launcher tells every rank."""

    launcher: int
    """The launcher's process id."""
    kind: str = "script"
    """``script``, ``module`` or ``command``."""
    local_rank_argument: bool = True
    """Whether ``--local_rank=N`` comes first among the arguments."""
    grace: float = 5
    """Seconds between being told to end and SIGKILL."""
    log: str = ""
    """The file for the rank's output, with {rank} in it; empty: the launcher's output."""
    cores: tuple[tuple[int, ...], ...] = ()
    """Processors for each local rank, or nothing."""

    def encode(self) -> str:
        """Return the task as one argument."""
        return json.dumps(self._asdict(), separators=(",", ":"))


class Tail:
    """A pipe that passes output on and remembers its last lines."""

    def __init__(self) -> None:
        self.lines: deque[bytes] = deque(maxlen=TAIL_LINES)
        self.reading, self.writing = os.pipe()
        self.thread = threading.Thread(target=self._copy, daemon=True)

    def start(self) -> None:
        """Begin to copy to stderr, in the process that does not write."""
        os.close(self.writing)
        self.thread.start()

    def _copy(self) -> None:
        with os.fdopen(self.reading, "rb", buffering=0) as source:
            rest = b""
            while piece := source.read(65536):
                os.write(STDERR, piece)
                *whole, rest = (rest + piece).split(b"\n")
                self.lines.extend(whole)
            self.lines.extend([rest] if rest else [])

    def text(self) -> str:
        """Return the last lines, once what was written has been read."""
        self.thread.join(timeout=1.0)
        return b"\n".join(self.lines).decode(errors="replace")


def main() -> None:
    """Run the task given on the command line."""
    task = Task(**json.loads(sys.argv[1]))
    local_rank = os.environ["LOCAL_RANK"]
    if task.log:
        _write_to(Path(task.log.format(rank=os.environ["RANK"])))
    if task.cores:
        os.sched_setaffinity(0, task.cores[int(local_rank)])
    tail = Tail() if task.kind == "command" else None
    with signals_held():
        guard = Guard(launcher=task.launcher, grace=task.grace)
        above = os.getpid()
        child = os.fork()
        if child:
            guard.listen()
            if tail:  # its thread keeps these signals blocked: they must interrupt the waiting
                tail.start()
        else:
            die_with(above, signal.SIGKILL)
            if tail:
                os.dup2(tail.writing, STDERR)
    if child:
        _leave(guard, child, task, tail)
    extra = [f"--local_rank={local_rank}"] if task.local_rank_argument else []
    sys.exit(script.run(task.kind, sys.argv[2], [*extra, *sys.argv[3:]]))


def _write_to(path: Path) -> None:
    """Send this process's output, and that of all below it, to a file."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(file, 1)
    os.dup2(file, STDERR)
    os.close(file)


def _leave(guard: Guard, child: int, task: Task, tail: Tail | None) -> None:
    """Wait for the script, complete its record, and end as it ended."""
    code, usage = guard.wait(child)
    if code != 0:
        last = tail.text() if tail else _crash_text()
        said = record.read()
        ended = (said.time if said else guard.ended_at) >= guard.told_at
        found = said or Record(guard.ended_at - UNNOTICED, code=code if code > 0 else None)
        unit = 1 if sys.platform == "darwin" else 1024
        record.write(
            found._replace(
                text=found.text or last,
                signal=max(0, -code),
                peak=usage.ru_maxrss * unit,
                ended=ended,
                log=task.log.format(rank=os.environ["RANK"]),
            )
        )
    os._exit(code if code >= 0 else 128 - code)


def _crash_text() -> str:
    path = script.crash_file()
    return path.read_text() if path.is_file() else ""


if __name__ == "__main__":
    main()
