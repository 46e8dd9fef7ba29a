"""Sharing out the cores of a machine among its ranks."""

from __future__ import annotations

import os
import re

from deepspeed.errors import ConfigError


def share_cores(ranks: int, core_list: str | None = None) -> list[list[int]]:
    """Give each rank an equal, contiguous share of the cores.

    Args:
        ranks: number of ranks.
        core_list: cores to share out, as ``0-3,8``; None: those this process may use.

    Raises:
        ConfigError: the list is malformed, or there are fewer cores than ranks.
    """
    cores = parse_core_list(core_list) if core_list else available_cores()
    each = len(cores) // ranks
    if each == 0:
        raise ConfigError(
            f"--bind_cores_to_rank: {len(cores)} cores cannot be shared by {ranks} ranks; start fewer ranks"
        )
    return [cores[rank * each : (rank + 1) * each] for rank in range(ranks)]


def available_cores() -> list[int]:
    """Return the cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def parse_core_list(text: str) -> list[int]:
    """Parse ``0-3,8`` to ``[0, 1, 2, 3, 8]``."""
    cores: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            raise ConfigError(f"--bind_core_list: expected numbers and ranges as 0-3,8, got {text!r}")
        cores.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return sorted(cores)
