"""Which devices of which hosts a job uses: hostfile, --include and --exclude.

NODE[@NODE ...]   where NODE is  name  or  name:slot,slot,...
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from deepspeed.errors import ConfigError, LaunchError, NotBuiltError

Slots = dict[str, list[int]]


def fetch_hostfile(path: str) -> dict[str, int] | None:
    """Read ``host slots=N`` lines; None where there is no file.

    Raises:
        ConfigError: a line is malformed, or a host stands twice.
    """
    if not os.path.isfile(path):
        return None
    hosts: dict[str, int] = {}
    with open(path) as lines:
        for number, line in enumerate(lines, 1):
            text = line.split("#")[0].strip()
            if not text:
                continue
            match = re.fullmatch(r"(\S+)\s+slots=(\d+)", text)
            if match is None:
                raise ConfigError(f"{path}:{number}: expected 'host slots=N', got {text!r}")
            if match[1] in hosts:
                raise ConfigError(f"{path}:{number}: host {match[1]!r} stands twice")
            hosts[match[1]] = int(match[2])
    return hosts or None


def parse_node_config(text: str) -> tuple[str, list[int] | None]:
    """Parse one NODE into its host and slots (None: all)."""
    host, colon, slots = text.partition(":")
    if not host or (colon and not re.fullmatch(r"\d+(,\d+)*", slots)):
        raise ConfigError(f"--include/--exclude: expected 'host' or 'host:0,1', got {text!r}")
    return host, [int(slot) for slot in slots.split(",")] if colon else None


def parse_inclusion_exclusion(resources: Mapping[str, int], inclusion: str, exclusion: str) -> Slots:
    """Apply --include or --exclude to ``{host: number of slots}``; return the slots that are left.

    Raises:
        ConfigError: both are given, or one names a host or slot that is not there.
    """
    available: Slots = {host: list(range(count)) for host, count in resources.items()}
    if inclusion and exclusion:
        raise ConfigError("--include and --exclude: expected one of them, got both")
    if not inclusion and not exclusion:
        return available
    named: Slots = {}
    for part in (inclusion or exclusion).split("@"):
        host, slots = parse_node_config(part.strip())
        if host not in available:
            raise ConfigError(
                f"--include/--exclude: expected one of the hosts {', '.join(available)}, got {host!r}"
            )
        for slot in slots or []:
            if slot not in available[host]:
                raise ConfigError(
                    f"--include/--exclude: {host} has slots 0 to {len(available[host]) - 1}, got {slot}"
                )
        named[host] = sorted(set(slots)) if slots is not None else available[host]
    if inclusion:
        return named
    left = {
        host: [slot for slot in slots if slot not in named.get(host, [])] for host, slots in available.items()
    }
    return {host: slots for host, slots in left.items() if slots}


def local_slots(
    gpus: int, num_gpus: int, include: str, exclude: str, hosts: Mapping[str, int] | None
) -> list[int]:
    """Return the device numbers to start ranks on; on a machine without GPUs they are just ranks.

    Args:
        gpus: GPUs of this machine.
        num_gpus: --num_gpus, or -1.
        include, exclude: filters, on ``localhost``.
        hosts: the hostfile's hosts, if there is one.

    Raises:
        LaunchError: more ranks than GPUs, or no rank is left.
        NotBuiltError: the hostfile names several hosts.
    """
    if hosts is not None and len(hosts) > 1:
        raise NotBuiltError(
            "deepspeed: several machines in the hostfile: not built yet; start one, or use torchrun"
        )
    if num_gpus != -1 and (include or exclude):
        raise ConfigError("--num_gpus: cannot be combined with --include or --exclude; use one of them")
    if num_gpus == 0 or num_gpus < -1:
        raise ConfigError(f"--num_gpus: expected a number above 0, got {num_gpus}")
    if gpus and num_gpus > gpus:
        raise LaunchError(f"--num_gpus: this machine has {gpus} GPUs, got {num_gpus}; ask for at most {gpus}")
    if num_gpus > 0:
        return list(range(num_gpus))
    count = gpus or _named_slots(include) or next(iter((hosts or {}).values()), 1)
    slots = parse_inclusion_exclusion({"localhost": count}, include, exclude).get("localhost", [])
    if not slots:
        raise LaunchError("--exclude: no device is left to run on")
    return slots


def _named_slots(include: str) -> int:
    """On a machine without GPUs, --include itself says how many ranks there can be."""
    slots = [slot for part in include.split("@") if part for slot in parse_node_config(part)[1] or []]
    return max(slots) + 1 if slots else 0
