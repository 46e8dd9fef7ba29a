"""The process above a rank's script: it ends when the launcher does, and leaves no descendant behind.

Note [No orphans]
    launcher dies     the kernel sends the guard SIGTERM (PR_SET_PDEATHSIG); it kills all below it at once
    guard dies        the kernel kills the script, for the same reason
    launcher stops    torch's agent signals the rank's process group; after a grace the guard kills the rest
    script fails      what it started is re-parented to the guard (PR_SET_CHILD_SUBREAPER), which kills it,
                      also when it moved to a process group of its own
    script succeeds   what it left running on purpose stays
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from resource import struct_rusage

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
PATIENCE = 5.0  # seconds for killed processes to be gone; one that hangs in the kernel is given up


class Guard:
    """Wait for one child; see Note [No orphans]."""

    def __init__(self, *, launcher: int, grace: float) -> None:
        """Take the launcher's process id, and the seconds between a signal to end and SIGKILL."""
        self.launcher = launcher
        self.grace = grace
        self.told_at = self.ended_at = math.inf
        _prctl(PR_SET_CHILD_SUBREAPER, 1)
        die_with(launcher, signal.SIGTERM)

    def listen(self) -> None:
        """Take the signals that mean the end."""
        for number in SIGNALS:
            signal.signal(number, self._told)
        signal.signal(signal.SIGALRM, lambda *_: kill_descendants())

    def _told(self, *_: object) -> None:
        if os.getppid() != self.launcher:
            kill_descendants()
        elif math.isinf(self.told_at):
            signal.setitimer(signal.ITIMER_REAL, self.grace)
        self.told_at = min(self.told_at, time.time())

    def wait(self, child: int) -> tuple[int, struct_rusage]:
        """Return how the child ended (negative: the signal) and what it used; then kill what it left."""
        pid = 0
        while pid != child:
            pid, status, usage = os.wait4(-1, 0)
        self.ended_at = time.time()  # at once: peers notice lost connections within milliseconds
        code = os.waitstatus_to_exitcode(status)
        if code != 0 or not math.isinf(self.told_at):
            clear()
        return code, usage


def die_with(parent: int, number: signal.Signals) -> None:
    """Have the kernel send this process a signal when its parent ends, also if it already has."""
    _prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os._exit(128 + number)


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Deliver the signals that mean the end only afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def kill_descendants() -> None:
    """Send SIGKILL to all processes below this one."""
    import psutil

    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            process.kill()


def clear() -> None:
    """Kill all processes below this one until there are none."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        kill_descendants()
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.01)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, int(value), 0, 0, 0)
