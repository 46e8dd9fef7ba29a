"""Hosts and their slots: the hostfile, and the grammar of --include and --exclude.

hostfile    worker-0 slots=4          one host a line, # starts a comment
filter      worker-0@worker-1:0,2     hosts joined by @; without slots: all of the host's
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from deepspeed.errors import ConfigError

DLTS_HOSTFILE = "/job/hostfile"
LINE = re.compile(r"(\S+)\s+slots\s*=\s*(\d+)")


def fetch_hostfile(hostfile_path: str) -> dict[str, int] | None:
    """Return each host's number of slots, in the file's order; None when there is no such file.

    Raises ConfigError for a file that is no text, a line that is not ``host slots=N``, a host named twice, or a
    file without hosts.
    """
    path = Path(hostfile_path)
    if not path.is_file():
        return None
    hosts: dict[str, int] = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        found = LINE.fullmatch(text)
        if found is None:
            raise ConfigError(f"{path}, line {number}: expected 'host slots=N', got {text!r}")
        if found[1] in hosts:
            raise ConfigError(f"{path}, line {number}: expected each host once, got {found[1]!r} again")
        hosts[found[1]] = int(found[2])
    if not hosts:
        raise ConfigError(f"{path}: expected at least one line 'host slots=N', got none")
    return hosts


def read_text(path: Path) -> str:
    """Return a file's text; ConfigError where it cannot be read or is no text."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: expected a readable UTF-8 text, got {error}") from None


def parse_inclusion_exclusion(
    resource_pool: Mapping[str, int], inclusion: str = "", exclusion: str = ""
) -> dict[str, list[int]]:
    """Apply the filters to hosts that have slots 0 to N-1."""
    slots = {host: list(range(count)) for host, count in resource_pool.items()}
    return parse_resource_filter(slots, inclusion, exclusion)


def parse_resource_filter(
    host_info: Mapping[str, list[int]], include_str: str = "", exclude_str: str = ""
) -> dict[str, list[int]]:
    """Return the hosts and slots that a filter leaves, in the order of `host_info`.

    Raises ConfigError when both filters are given, a host or slot does not exist, or nothing is left.
    """
    if include_str and exclude_str:
        raise ConfigError("--include: expected to stand alone, got --exclude too; give one of them")
    if not include_str and not exclude_str:
        return dict(host_info)
    option, text = ("--include", include_str) if include_str else ("--exclude", exclude_str)
    named: dict[str, set[int]] = {}
    for host, slots in parse_filter(text, option):
        named.setdefault(host, set()).update(_known(host_info, host, slots, option))
    left = {
        host: [slot for slot in slots if (slot in named.get(host, ())) == bool(include_str)]
        for host, slots in host_info.items()
    }
    left = {host: slots for host, slots in left.items() if slots}
    if not left:
        raise ConfigError(f"{option}: expected to leave at least one slot, got {text!r}, which leaves none")
    return left


def parse_filter(text: str, option: str) -> Iterator[tuple[str, list[int] | None]]:
    """Yield the host and slots (None: all) of each part of a filter."""
    for part in text.split("@"):
        host, colon, listed = part.strip().partition(":")
        slots = listed.split(",") if colon else []
        if not host or not all(slot.strip().isdecimal() for slot in slots):
            raise ConfigError(f"{option}: expected host or host:slot,slot joined by @, got {text!r}")
        yield host, [int(slot) for slot in slots] if colon else None


def _known(host_info: Mapping[str, list[int]], host: str, slots: list[int] | None, option: str) -> list[int]:
    if host not in host_info:
        raise ConfigError(f"{option}: expected one of {', '.join(host_info)}, got host {host!r}")
    for slot in slots or ():
        if slot not in host_info[host]:
            there = ", ".join(map(str, host_info[host]))
            raise ConfigError(f"{option}: expected slots of {host} among {there}, got {slot}")
    return host_info[host] if slots is None else slots
