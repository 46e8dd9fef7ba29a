"""Sharing the machine's cores out to ranks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from deepspeed.common.processors import usable_processors
from deepspeed.errors import ConfigError

SIBLINGS = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"

Core = list[int]
"""The logical processors of one physical core that this process may use."""


def usable_cores() -> list[Core]:
    """Return the physical cores this process may run on."""
    cores: dict[int, Core] = {}
    for cpu in usable_processors():
        path = Path(SIBLINGS.format(cpu))
        siblings = parse_cpus(path.read_text().strip()) if path.exists() else [cpu]
        cores.setdefault(min(siblings), []).append(cpu)
    return list(cores.values())


def listed_cores(text: str) -> list[Core]:
    """Return the processors named by --bind_core_list, each as a core of its own."""
    try:
        cpus = parse_cpus(text)
    except ValueError:
        raise ConfigError(
            f"--bind_core_list: expected numbers and ranges like 0-7,16, got {text!r}"
        ) from None
    allowed = {cpu for core in usable_cores() for cpu in core}
    foreign = sorted(set(cpus) - allowed)
    if foreign:
        raise ConfigError(f"--bind_core_list: expected processors this process may use, got {foreign}")
    return [[cpu] for cpu in cpus]


def parse_cpus(text: str) -> list[int]:
    """Return the numbers of ``0-3,8`` in order, each once (ValueError for anything else)."""
    cpus: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        cpus.update(range(int(first), int(last if dash else first) + 1))
    return sorted(cpus)


def share(cores: Sequence[Core], ranks: int) -> list[list[Core]]:
    """Give each rank an equal run of neighbouring cores; what does not divide evenly stays free."""
    each = len(cores) // ranks
    if each == 0:
        raise ConfigError(
            f"--bind_cores_to_rank: expected at least {ranks} cores, one for each rank, got {len(cores)}; "
            "start fewer ranks or leave the option out"
        )
    return [list(cores[rank * each : (rank + 1) * each]) for rank in range(ranks)]
