"""Memory that the ranks of one host share, and the signals that go with it.

Note [Rooms and signals]
    A rank writes what others shall read into a room: a block of anonymous memory (memfd) that they map too.
    A Unix socket between each two ranks carries the signals; the first one about a room brings its file
    descriptor along.

        writer    room = links.room(nbytes), fill it, links.announce(room)     "number 7 is in your room 2"
        reader    room = links.awaited(writer, 7), read it, links.done(7)      "number 7 may be overwritten"

    Calls have the same numbers on every rank, because all ranks make them in the same order. Posting never
    waits for a peer: while every room is still being read, another one is made. A socket orders memory on
    every processor, wakes the one who waits, and reports a peer that died.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import socket
import struct
import sys
import uuid
import weakref
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepspeed.errors import CommunicationError

SIGNAL = struct.Struct("<cQQQ")  # kind, number of the call, room, bytes of the room
READY, DONE, SHARE = b"r", b"d", b"s"
PAGE = mmap.PAGESIZE
PATIENCE = 60.0  # seconds for all ranks of a group to connect


class Room:
    """A block of memory that one rank writes and the others read."""

    def __init__(self, fd: int, nbytes: int, index: int) -> None:
        self.nbytes, self.index = nbytes, index
        self._bytes = torch.frombuffer(mmap.mmap(fd, nbytes), dtype=torch.uint8)
        self.readers: set[int] = set()

    def view(self, numel: int, dtype: torch.dtype) -> Tensor:
        """View the first `numel` elements."""
        return self._bytes[: numel * dtype.itemsize].view(dtype)


class Links:
    """This rank's rooms, the peers' rooms, and the sockets to them.

    Args:
        rank: of this process in the group.
        sockets: by rank of the peer.
        timeout: how long to wait for a peer.
    """

    def __init__(self, rank: int, sockets: dict[int, socket.socket], timeout: timedelta) -> None:
        self.rank, self.size = rank, len(sockets) + 1
        self._sockets = sockets
        self._timeout = timeout.total_seconds()
        self._peer_of = {link.fileno(): peer for peer, link in sockets.items()}
        self._poll = select.poll()
        for descriptor, link in zip(self._peer_of, sockets.values(), strict=True):
            self._poll.register(descriptor, select.POLLIN)
            link.settimeout(self._timeout)
        self._rooms: list[Room] = []
        self._theirs: dict[tuple[int, int], Room] = {}
        self._announced: dict[tuple[int, int], Room] = {}
        self._shared: dict[tuple[int, int], int] = {}
        self._reading: dict[int, Room] = {}
        self._unknown: dict[int, int] = {}  # descriptors of rooms that the peers do not have yet
        self._calls = 0
        self._closing = weakref.finalize(self, _close, list(sockets.values()), self._unknown)

    def room(self, nbytes: int) -> Room:
        """Return a room of at least `nbytes` that nobody reads."""
        self._drain()
        free = [one for one in self._rooms if not one.readers and one.nbytes >= nbytes]
        if free:
            return min(free, key=lambda one: one.nbytes)
        size = max(1, -(-nbytes // PAGE)) * PAGE
        descriptor = os.memfd_create("deepspeed", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, size)
        room = Room(descriptor, size, len(self._rooms))
        self._rooms.append(room)
        self._unknown[room.index] = descriptor
        return room

    def announce(self, room: Room) -> int:
        """Tell all peers that `room` is filled; return the number of this call."""
        self._calls += 1
        message = SIGNAL.pack(READY, self._calls, room.index, room.nbytes)
        room.readers = set(self._sockets)
        self._reading[self._calls] = room
        descriptor = self._unknown.pop(room.index, None)
        for peer in self._sockets:
            try:
                self._send(peer, message, *([] if descriptor is None else [descriptor]))
            except ConnectionError:
                raise CommunicationError(f"rank {peer} of the group ended before rank {self.rank}") from None
        if descriptor is not None:
            os.close(descriptor)
        return self._calls

    def awaited(self, peer: int, call: int) -> Room:
        """Wait until `peer` has filled its room for this call, and return it.

        Raises:
            CommunicationError: the peer is gone, or did not come in time.
        """
        while (peer, call) not in self._announced:
            self._receive_or_raise(peer)
        return self._announced.pop((peer, call))

    def is_here(self, call: int) -> bool:
        """Tell whether every peer has filled its room for this call."""
        self._drain()
        return all((peer, call) in self._announced for peer in self._sockets)

    def done(self, call: int) -> None:
        """Tell all peers that their rooms of this call have been read; one that has ended need not know."""
        for peer in self._sockets:
            with contextlib.suppress(ConnectionError):
                self._send(peer, SIGNAL.pack(DONE, call, 0, 0))

    def share(self, descriptor: int) -> dict[int, int]:
        """Give every peer a file descriptor, and return the one that each of them gave, by rank."""
        self._calls += 1
        call = self._calls
        for peer in self._sockets:
            self._send(peer, SIGNAL.pack(SHARE, call, 0, 0), descriptor)
        for peer in self._sockets:
            while (peer, call) not in self._shared:
                self._receive_or_raise(peer)
        return {peer: self._shared.pop((peer, call)) for peer in self._sockets}

    def _drain(self) -> None:
        """Take the signals that have arrived."""
        while arrived := self._poll.poll(0):
            for descriptor, _ in arrived:
                if not self._receive(self._peer_of[descriptor]):
                    self._poll.unregister(descriptor)

    def _receive_or_raise(self, peer: int) -> None:
        if not self._receive(peer):
            raise CommunicationError(f"rank {peer} of the group ended while rank {self.rank} waited for it")

    def _receive(self, peer: int) -> bool:
        """Wait for one signal and take it; False where the peer has ended."""
        try:
            message, descriptors, _, _ = socket.recv_fds(self._sockets[peer], SIGNAL.size, 1)
        except ConnectionResetError:  # it ended before it read our last signals; its own may still be here
            return self._receive(peer)
        except TimeoutError:
            raise CommunicationError(
                f"rank {peer} of the group did not reach this collective in {self._timeout:.0f} s; "
                "it is stuck, or the ranks run different collectives"
            ) from None
        if message:
            self._take(peer, message, descriptors)
        return bool(message)

    def _take(self, peer: int, message: bytes, descriptors: list[int]) -> None:
        kind, call, index, nbytes = SIGNAL.unpack(message)
        if kind == DONE:
            room = self._reading[call]
            room.readers.discard(peer)
            if not room.readers:
                del self._reading[call]
            return
        if kind == SHARE:
            self._shared[peer, call] = descriptors[0]
            return
        if descriptors:
            self._theirs[peer, index] = Room(descriptors[0], nbytes, index)
            os.close(descriptors[0])
        self._announced[peer, call] = self._theirs[peer, index]

    def _send(self, peer: int, message: bytes, *descriptors: int) -> None:
        try:
            socket.send_fds(self._sockets[peer], [message], descriptors)
        except TimeoutError:
            raise CommunicationError(f"rank {peer} of the group does not read its signals") from None

    def close(self) -> None:
        """Close the sockets; also done when nobody holds the links any more."""
        self._closing()


def _close(sockets: list[socket.socket], descriptors: dict[int, int]) -> None:
    for link in sockets:
        link.close()
    for descriptor in descriptors.values():
        os.close(descriptor)


_LINKS: weakref.WeakKeyDictionary[dist.ProcessGroup, Links | None] = weakref.WeakKeyDictionary()
"""What torch cannot keep on a group itself; an entry goes when its group does."""


def links_of(group: dist.ProcessGroup | None) -> Links | None:
    """Return a group's links, made when its first collective asks; None where its ranks share no memory."""
    key: Any = dist.group.WORLD if group is None else group
    if key not in _LINKS:
        _LINKS[key] = _connect(key)
    return _LINKS[key]


def _connect(group: Any) -> Links | None:
    """Link all ranks of a group, or none."""
    size = dist.get_world_size(group)
    if size == 1:
        return None
    listener = _listen(size)
    offers: list[tuple[str, bytes]] = [("", b"")] * size
    dist.all_gather_object(offers, (_host(), _address(listener)), group=group)
    sockets = None
    if listener is not None and all(offer[1] and offer[0] == offers[0][0] for offer in offers):
        sockets = _meet(listener, dist.get_rank(group), [address for _, address in offers])
    everybody = [False] * size
    dist.all_gather_object(everybody, sockets is not None, group=group)
    if sockets is None or not all(everybody):
        return None
    return Links(dist.get_rank(group), sockets, _timeout_of(group))


def _listen(size: int) -> socket.socket | None:
    if not sys.platform.startswith("linux") or not hasattr(os, "memfd_create"):
        return None
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.settimeout(PATIENCE)
    try:
        listener.bind(f"\0deepspeed-{uuid.uuid4().hex}")
        listener.listen(size)
    except OSError:
        listener.close()
        return None
    return listener


def _address(listener: socket.socket | None) -> bytes:
    return b"" if listener is None else listener.getsockname()


def _host() -> str:
    """Name what two processes must have in common to reach each other's abstract sockets."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        return f"{boot} {os.stat('/proc/self/ns/net').st_ino} {os.getuid()}"
    except OSError:
        return ""


def _meet(listener: socket.socket, rank: int, addresses: list[bytes]) -> dict[int, socket.socket] | None:
    """Connect to the lower ranks and let the higher ones connect."""
    sockets = {}
    try:
        with listener:
            for peer in range(rank):
                sockets[peer] = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                sockets[peer].settimeout(PATIENCE)
                sockets[peer].connect(addresses[peer])
                sockets[peer].send(rank.to_bytes(8, "little"))
            while len(sockets) < len(addresses) - 1:
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


def _timeout_of(group: Any) -> timedelta:
    backend = group._get_backend(torch.device("cpu"))
    timeout: timedelta = backend.options._timeout
    return timeout
