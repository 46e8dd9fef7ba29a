"""Which ranks of a group share a host, and how they connect."""

from __future__ import annotations

import os
import socket
import struct
import sys
import uuid
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from deepspeed.comm.calls import guarded
from deepspeed.comm.links import Links
from deepspeed.comm.rooms import SEGMENT, SWITCH, new_memory

OFF = ("0", "false", "off", "no")
PATIENCE = 60.0  # seconds for all ranks of a group to connect
FIRST = b"the first call of a group"  # words of what connects them
OFFER = 256  # bytes of what a rank says then


@dataclass(frozen=True)
class Neighbours:
    """The ranks of a group that share a host with this one, and who shares which."""

    links: Links
    hosts: tuple[tuple[int, ...], ...]
    """Ranks of the group on each host, as many on one as on the other."""

    @property
    def are_everyone(self) -> bool:
        """Whether all ranks of the group share this host."""
        return len(self.hosts) == 1


_NEIGHBOURS: weakref.WeakKeyDictionary[dist.ProcessGroup, Neighbours | None] = weakref.WeakKeyDictionary()
"""What torch cannot keep on a group itself; an entry goes when its group does."""


def neighbours_of(group: dist.ProcessGroup | None) -> Neighbours | None:
    """Return this rank's neighbours, linked when a group's first collective asks; None on all ranks, or on none."""
    key: Any = dist.group.WORLD if group is None else group
    if key not in _NEIGHBOURS:
        _NEIGHBOURS[key] = _connect(key)
    return _NEIGHBOURS[key]


def links_of(group: dist.ProcessGroup | None) -> Links | None:
    """Return a group's links; None where its ranks do not all share memory."""
    found = neighbours_of(group)
    return found.links if found is not None and found.are_everyone else None


def are_near(group: Any) -> bool:
    """Tell whether all ranks of a group are known to share memory; nobody is asked."""
    found = _NEIGHBOURS.get(group)
    return found is not None and found.are_everyone


def _connect(group: Any) -> Neighbours | None:
    """Link the ranks of a group on every host, or on none."""
    size, me = dist.get_world_size(group), dist.get_rank(group)
    if size == 1:
        return None
    backend, listener = group._get_backend(torch.device("cpu")), _listen(size)
    offers = [offer.split("/") for offer in _told(backend, f"{_host()}/{_address(listener)}", size)]
    hosts = _by_host([host if name else "" for host, name in offers])
    near = next((ranks for ranks in hosts if me in ranks), ())
    sockets = None
    if listener is not None:
        with listener:
            sockets = _meet(listener, near.index(me), [offers[rank][1] for rank in near]) if near else None
    if not all(_told(backend, "" if sockets is None else "met", size)) or sockets is None:
        return None
    everyone = dist.get_process_group_ranks(group)
    links = Links(near.index(me), sockets, backend.options._timeout, [everyone[rank] for rank in near])
    return Neighbours(links, hosts)


def _by_host(names: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Sort ranks by the names of their hosts; nothing if one has no name or no neighbour, or counts differ."""
    found: dict[str, list[int]] = {}
    for rank, name in enumerate(names):
        found.setdefault(name, []).append(rank)
    counts = {len(ranks) for ranks in found.values()}
    if "" in found or 1 in counts or len(counts) > 1:
        return ()
    return tuple(tuple(ranks) for ranks in found.values())


def _told(backend: Any, said: str, size: int) -> list[str]:
    """Exchange a few words between all ranks, by gloo itself: the group's own functions may want its links."""
    mine = torch.tensor(list(said.encode().ljust(OFFER)), dtype=torch.uint8, device="cpu")
    theirs = [torch.empty_like(mine) for _ in range(size)]
    guarded(FIRST, backend.allgather([theirs], [mine]).wait)
    return [bytes(one.tolist()).decode().rstrip() for one in theirs]


def _listen(size: int) -> socket.socket | None:
    if os.environ.get(SWITCH, "1").lower() in OFF or not sys.platform.startswith("linux"):
        return None
    try:
        os.close(new_memory("deepspeed", SEGMENT))
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    except (AttributeError, OSError):  # musl before 3.10's; a sandbox; a limit on files
        return None
    listener.settimeout(PATIENCE)
    try:
        listener.bind(f"\0deepspeed-{uuid.uuid4().hex}")
        listener.listen(size)
    except OSError:
        listener.close()
        return None
    return listener


def _address(listener: socket.socket | None) -> str:
    """Return the abstract name of a socket, without the zero that marks it."""
    name: str = "" if listener is None else listener.getsockname()[1:].decode()
    return name


def _host() -> str:
    """Name what two processes must have in common to reach each other's abstract sockets."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        return f"{boot.strip()} {os.stat('/proc/self/ns/net').st_ino} {os.getuid()}"
    except OSError:
        return ""


def _meet(listener: socket.socket, rank: int, names: Sequence[str]) -> dict[int, socket.socket] | None:
    """Connect to the lower ranks and let the higher ones connect."""
    sockets = {}
    try:
        for peer in range(rank):
            sockets[peer] = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            sockets[peer].settimeout(PATIENCE)
            sockets[peer].connect(f"\0{names[peer]}")
            sockets[peer].send(rank.to_bytes(8, "little"))
        while len(sockets) < len(names) - 1:
            link, _ = listener.accept()
            link.settimeout(PATIENCE)
            if _user_of(link) == os.getuid():
                sockets[int.from_bytes(link.recv(8), "little")] = link
    except OSError:
        return None
    return sockets


def _user_of(link: socket.socket) -> int:
    credentials = link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    user: int = struct.unpack("3i", credentials)[1]
    return user
