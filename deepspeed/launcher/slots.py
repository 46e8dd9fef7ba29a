"""Which devices of this machine the ranks get."""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from deepspeed.accelerator import get_accelerator
from deepspeed.errors import ConfigError, NotBuiltError
from deepspeed.launcher.hosts import fetch_hostfile, parse_filter, parse_resource_filter

LOCALHOST = "localhost"


@dataclass(frozen=True)
class Slots:
    """The ranks to start, and the environment that shows them their devices."""

    ranks: int
    environment: Mapping[str, str]


@dataclass(frozen=True)
class Devices:
    """Devices as their visibility variable names them; on the CPU there are none."""

    names: tuple[str, ...] = ()
    variable: str | None = None

    @classmethod
    def here(cls) -> Devices:
        """Return the devices this process may use, in their order."""
        accelerator = get_accelerator()
        if accelerator.on_host:
            return cls()
        count = accelerator.device_count()
        variable = next(iter(accelerator.visible_devices_envs()), None)
        shown = os.environ.get(variable, "") if variable else ""
        names = (
            [name.strip() for name in shown.split(",")] if shown else [str(index) for index in range(count)]
        )
        return cls(tuple(names[:count]), variable)

    @property
    def numbers(self) -> list[int]:
        """The numbers --include knows them by: their own, or positions where they have no plain number."""
        plain = all(name.isdecimal() for name in self.names)
        return [int(name) for name in self.names] if plain else list(range(len(self.names)))

    def choose(self, numbers: list[int]) -> Slots:
        """Return slots for the devices with these numbers, in the machine's order."""
        chosen = [name for number, name in zip(self.numbers, self.names, strict=True) if number in numbers]
        if self.variable is None or len(chosen) == len(self.names):
            return Slots(len(chosen), {})
        return Slots(len(chosen), {self.variable: ",".join(chosen)})


def choose_slots(options: argparse.Namespace) -> Slots:
    """Return what the options ask for.

    Raises ConfigError when there are fewer devices, NotBuiltError when a hostfile asks for other nodes.
    """
    devices = Devices.here()
    limit = _slots_in_hostfile(options)
    if options.include or options.exclude:
        return _filtered(options, devices, limit)
    count = options.num_gpus if options.num_gpus > 0 else limit
    if not devices.names:
        return Slots(count or 1, {})
    if count is not None and count > len(devices.names):
        raise ConfigError(
            f"--num_gpus: expected at most {len(devices.names)}, the devices this machine has, got {count}; "
            "ranks do not share a device"
        )
    return devices.choose(devices.numbers[:count])


def _slots_in_hostfile(options: argparse.Namespace) -> int | None:
    """Return how many slots the hostfile gives this machine; None without a hostfile."""
    hosts = fetch_hostfile(options.hostfile)
    if hosts is None:
        return None
    here = [host for host in hosts if is_here(host)]
    if len(here) != 1 or (len(hosts) > 1 and options.num_nodes != 1):
        raise NotBuiltError(
            f"--hostfile: starting several nodes is not built yet, got {', '.join(hosts)} in {options.hostfile}; "
            "name only this machine, or leave the option out"
        )
    return hosts[here[0]]


def _filtered(options: argparse.Namespace, devices: Devices, limit: int | None) -> Slots:
    option, text = ("--include", options.include) if options.include else ("--exclude", options.exclude)
    parts = list(parse_filter(text, option))
    away = [host for host, _ in parts if not is_here(host)]
    if away:
        raise NotBuiltError(
            f"{option}: starting several nodes is not built yet, got host {away[0]!r}; name only localhost"
        )
    there = devices.numbers if devices.names else _as_many_as_named(parts)
    named = "@".join(
        LOCALHOST + ("" if slots is None else f":{','.join(map(str, slots))}") for _, slots in parts
    )
    chosen = parse_resource_filter(
        {LOCALHOST: there[:limit]}, *((named, "") if options.include else ("", named))
    )
    numbers = chosen[LOCALHOST]
    return devices.choose(numbers) if devices.names else Slots(len(numbers), {})


def _as_many_as_named(parts: list[tuple[str, list[int] | None]]) -> list[int]:
    """Return CPU slots up to the highest one a filter names: there can be any number of them."""
    return list(range(max([0, *(slot for _, slots in parts for slot in slots or ())]) + 1))


def is_here(host: str) -> bool:
    """Tell whether a host's name means this machine."""
    return host in (LOCALHOST, "127.0.0.1", "::1", socket.gethostname())
