"""The processors that a process may run on."""

from __future__ import annotations

import os


def usable_processors(pid: int = 0) -> list[int]:
    """Return the logical processors of a process (0: this one): a container or a launcher may allow it a few only.

    All of the machine, where the system does not say or does not show that process.
    """
    try:
        return sorted(os.sched_getaffinity(pid))
    except (AttributeError, OSError):
        return list(range(os.cpu_count() or 1))
