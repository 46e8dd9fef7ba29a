"""Which rank failed first, why, and how to say it."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass

import psutil
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from deepspeed.launcher import record
from deepspeed.launcher.record import Record

MEANINGS = {
    "SIGKILL": "probably out of host memory",
    "SIGSEGV": "native code touched memory that is not there",
    "SIGBUS": "probably shared memory is used up; see the size of /dev/shm",
    "SIGABRT": "native code gave up; its last words are above",
    "SIGILL": "a library was built for another processor",
    "SIGFPE": "native code divided by zero",
    "SIGTERM": "somebody else told it to end",
    "SIGINT": "somebody else interrupted it",
    "SIGHUP": "its terminal was closed",
    "SIGXCPU": "its limit of processor time was reached",
}


@dataclass(frozen=True)
class Report:
    """What the launcher prints last, and its exit code."""

    text: str
    code: int


def report(failures: Mapping[int, ProcessFailure]) -> Report:
    """Describe the first failure of those that torch's agent collected, by global rank.

    First is by the time at which a script failed or a process ended, among those that were not ended because
    another had failed.
    """
    records = {rank: _record(failure) for rank, failure in failures.items()}
    first = min(records, key=lambda rank: (records[rank].ended, records[rank].time, rank))
    found = records[first]
    headline = f"deepspeed: rank {first} {_what(found)}"
    ended = sum(other.ended for rank, other in records.items() if rank != first)
    others = f"; {ended} other rank{'s were' if ended > 1 else ' was'} ended" if ended else ""
    log = f"\nIts output is in {found.log}" if found.log else ""
    text = f"\n{found.text.rstrip()}" if found.text else ""
    return Report(f"{headline}{others}{log}{text}", _code(found))


def _record(failure: ProcessFailure) -> Record:
    """Return what the rank wrote, or what its exit alone says."""
    written = record.parse(failure.error_file_data)
    if written is not None:
        return written
    code = failure.exitcode
    return Record(float(failure.timestamp), code=code if code > 0 else None, signal=max(0, -code))


def _code(found: Record) -> int:
    """Return the script's exit code, or 128 plus the signal, as a shell would."""
    return found.code or (128 + found.signal if found.signal else 1)


def _what(found: Record) -> str:
    if found.code == 0 and found.signal:
        return f"ran its script to the end and was {in_words(found)} while closing"
    if found.code is None and found.signal:
        return f"was {in_words(found)}"
    if found.summary and found.text:
        return f"failed: {found.summary}"
    return f"exited with code {found.code}" + (f": {found.summary}" if found.summary else "")


def in_words(found: Record) -> str:
    """Return ``killed by SIGKILL: probably out of host memory (...)``."""
    try:
        name = signal.Signals(found.signal).name
    except ValueError:
        name = f"signal {found.signal}"
    meaning = f": {MEANINGS[name]}" if name in MEANINGS else ""
    if name == "SIGKILL" and found.peak:
        total = psutil.virtual_memory().total
        meaning += f" (its peak was {_gib(found.peak)}, this machine has {_gib(total)})"
    return f"killed by {name}{meaning}"


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
