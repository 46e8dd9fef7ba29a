"""Memory that the ranks of one host share, and the signals that go with it.

Note [Rooms and signals]
    A rank writes what others shall read into a room: a block of anonymous memory (memfd) that they map too.
    A Unix socket between each two ranks carries the signals; the first one about a room brings its file
    descriptor along.

        writer    room = links.room(nbytes), fill it, links.announce(room)     "number 7 is in your room 2"
        reader    room = links.awaited(writer, 7), read it, links.done(7)      "number 7 may be overwritten"

    Calls have the same numbers on every rank, because all ranks make them in the same order. Posting never
    waits for a peer: while every room is still being read, another one is made, and signals that a socket has
    no place for are kept, and sent by the next wait in whichever group. The size of a room is a power of two
    (what nobody writes takes no memory), so that messages of many sizes share few. A socket orders memory on
    every processor, wakes the one who waits, and reports a peer that died; a forked child closes its copies.
    Signals say what the call is; see note [Same call, same words]. A call that goes another way is only noted,
    so that it can be compared too.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import select
import socket
import struct
import sys
import threading
import time
import uuid
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepspeed.comm.calls import LONGEST, disagreement, guarded, here, readable
from deepspeed.errors import CommunicationError

SWITCH = "DEEPSPEED_SHARED_MEMORY"
"""Environment variable; ``0`` on any rank leaves all traffic on the CPU to gloo."""

OFF = ("0", "false", "off", "no")

SIGNAL = struct.Struct("<cQQQ")  # kind, number of the call, room, bytes of the room; then the call's words
READY, DONE, SHARE, NOTE, PLACE = b"r", b"d", b"s", b"n", b"p"
LOOK = 1000  # milliseconds between two looks at how long a wait lasts
SOON = 5  # the same while signals are kept
KEPT = 32  # words of calls to keep before looking which are of use no more
MANNERS = 2.0  # seconds for a peer that makes another call to say where
PAGE = mmap.PAGESIZE
PATIENCE = 60.0  # seconds for all ranks of a group to connect
FIRST = b"the first call of a group"  # words of what connects them
OFFER = 256  # bytes of what a rank says then


class Room:
    """A block of memory that one rank writes and the others read."""

    def __init__(self, fd: int, nbytes: int, index: int) -> None:
        self.nbytes, self.index = nbytes, index
        self._mapping = _mapped(fd, nbytes)
        with torch.inference_mode(False):  # it outlives the call in which it is made
            self._bytes = torch.frombuffer(self._mapping, dtype=torch.uint8)
        self.readers: set[int] = set()

    def view(self, numel: int, dtype: torch.dtype) -> Tensor:
        """View the first `numel` elements."""
        return self._bytes[: numel * dtype.itemsize].view(dtype)

    def leave(self) -> None:
        """Count a peer's room no longer as memory of this rank's; it is mapped again when it is read again."""
        _libc().madvise(self._mapping, ctypes.c_size_t(self.nbytes), mmap.MADV_DONTNEED)


class Links:
    """This rank's rooms, the peers' rooms, and the sockets to them.

    Args:
        rank: of this process in the group.
        sockets: by rank of the peer.
        timeout: how long to wait for a peer.
        names: global rank of each rank of the group; without, they are the same.
    """

    def __init__(
        self,
        rank: int,
        sockets: dict[int, socket.socket],
        timeout: timedelta,
        names: Sequence[int] | None = None,
    ) -> None:
        self.rank, self.size = rank, len(sockets) + 1
        self.names = names or range(self.size)
        self._sockets = sockets
        self._timeout = self._patience = timeout.total_seconds()
        self._peer_of = {link.fileno(): peer for peer, link in sockets.items()}
        self._poll = select.poll()
        for descriptor, link in zip(self._peer_of, sockets.values(), strict=True):
            self._poll.register(descriptor, select.POLLIN)
            link.setblocking(False)
        self._kept: dict[int, deque[Signal]] = {peer: deque() for peer in sockets}
        self._rooms: list[Room] = []
        self._theirs: dict[tuple[int, int], Room] = {}
        self._announced: dict[tuple[int, int], Room] = {}
        self._shared: dict[tuple[int, int], int] = {}
        self._reading: dict[int, Room] = {}
        self._visited: dict[int, list[Room]] = {}  # rooms of peers that I am reading
        self._unknown: dict[int, int] = {}  # descriptors of rooms that the peers do not have yet
        self._calls = 0
        self._said: dict[int, bytes] = {}  # words of my calls that some peer has not made yet
        self._heard: dict[int, dict[int, bytes]] = {}  # words of the peers' calls that I have not made yet
        self._latest = dict.fromkeys(sockets, 0)  # the last call of each peer
        self._ended: set[int] = set()
        self._places: dict[int, str] = {}  # of peers that disagree
        self._broken: CommunicationError | None = None
        self._closing = weakref.finalize(self, _close, sockets, self._unknown, self._kept)
        _LIVE.add(self)

    def room(self, nbytes: int) -> Room:
        """Return a room of at least `nbytes` that nobody reads."""
        self.drain()
        free = [one for one in self._rooms if not one.readers and one.nbytes >= nbytes]
        if free:
            return min(free, key=lambda one: one.nbytes)
        size = max(PAGE, 1 << (nbytes - 1).bit_length())
        try:
            descriptor = os.memfd_create("deepspeed", os.MFD_CLOEXEC)
            os.ftruncate(descriptor, size)
            room = Room(descriptor, size, len(self._rooms))
        except OSError as error:
            raise CommunicationError(
                f"no memory to share for {nbytes} bytes beside {len(self._rooms)} rooms of calls that no rank or not "
                f"every one has waited for: {error}; wait for some, or set {SWITCH}=0 to leave all to gloo"
            ) from error
        self._rooms.append(room)
        self._unknown[room.index] = descriptor
        return room

    def announce(self, room: Room, what: bytes = b"") -> int:
        """Tell all peers that `room` is filled for a call with these words; return the number of the call."""
        self._calls += 1
        room.readers = set(self._sockets)
        self._reading[self._calls] = room
        descriptor = self._unknown.pop(room.index, None)
        fresh = [] if descriptor is None else [descriptor]
        self._tell(SIGNAL.pack(READY, self._calls, room.index, room.nbytes), what, *fresh)
        if descriptor is not None:
            os.close(descriptor)
        return self._calls

    def note(self, what: bytes) -> int:
        """Tell all peers that this rank is in a call for which it fills no room; return the number of the call."""
        self.drain()
        self._calls += 1
        self._tell(SIGNAL.pack(NOTE, self._calls, 0, 0), what)
        return self._calls

    def awaited(self, peer: int, call: int) -> Room:
        """Wait until `peer` has filled its room for this call, and return it.

        Raises:
            CommunicationError: a peer is gone, makes another call, or did not come in time.
        """
        self._wait_for(peer, call)
        room = self._announced.pop((peer, call), None)
        if room is None:  # a tensor that is not contiguous, say, goes through gloo
            raise CommunicationError(
                f"rank {self.names[peer]} makes {self.doing(call)} with tensors of another kind than rank "
                f"{self.names[self.rank]}{here()}; give contiguous tensors of one dtype on the CPU on every rank"
            )
        self._visited.setdefault(call, []).append(room)
        return room

    def begun(self, call: int) -> None:
        """Wait until every peer has begun this call (CommunicationError: as in `awaited`)."""
        for peer in self._sockets:
            self._wait_for(peer, call)

    def is_here(self, call: int) -> bool:
        """Tell whether every peer has begun this call, or one has ended before: who waits is told at once."""
        self.drain()
        missing = {peer for peer, latest in self._latest.items() if latest < call}
        return not missing or not missing.isdisjoint(self._ended)

    def done(self, call: int, *writers: int) -> None:
        """Tell peers (none named: all) that their rooms of this call have been read; who has ended need not know."""
        for room in self._visited.pop(call, ()):
            room.leave()
        for peer in writers or self._sockets:
            with suppress(ConnectionError):
                self._send(peer, SIGNAL.pack(DONE, call, 0, 0))

    def share(self, descriptor: int, what: bytes = b"") -> dict[int, int]:
        """Give every peer a file descriptor, and return the one that each of them gave, by rank."""
        self._calls += 1
        call = self._calls
        self._tell(SIGNAL.pack(SHARE, call, 0, 0), what, descriptor)
        self.begun(call)
        return {peer: self._shared.pop((peer, call)) for peer in self._sockets}

    @contextmanager
    def patient(self, timeout: timedelta | None) -> Iterator[None]:
        """Wait for peers no longer than this, or than the group's timeout; torch says 0 where it means None."""
        if timeout:
            self._patience = min(self._timeout, timeout.total_seconds())
        try:
            yield
        finally:
            self._patience = self._timeout

    def drain(self) -> None:
        """Take the signals that have arrived, and send those that were kept."""
        if any(self._kept.values()):
            self.flush()
        while arrived := self._poll.poll(0):
            self._receive(arrived)

    def _tell(self, signal: bytes, what: bytes, *descriptors: int) -> None:
        """Begin a call: send all peers its signal, and compare it with what was heard of it before."""
        self._said[self._calls] = what
        for peer in self._sockets:
            try:
                self._send(peer, signal + what, *descriptors)
            except ConnectionError:
                self._ended.add(peer)
        if self._ended:
            self.drain()  # what they had to say before
            for peer in self._ended:
                self._require(peer, self._calls)
        for peer, theirs in self._heard.pop(self._calls, {}).items():
            self._compare(peer, self._calls, theirs)
        if self._broken is not None:
            raise self._broken
        if len(self._said) > KEPT:
            everywhere = min(self._latest.values())
            self._said = {number: said for number, said in self._said.items() if number > everywhere}

    def _compare(self, peer: int, call: int, theirs: bytes) -> None:
        mine = self._said.get(call)
        if mine is None:
            self._heard.setdefault(call, {})[peer] = theirs
            return
        if mine != theirs and self._broken is None:
            self._broken = self._disagreement(peer, call, mine, theirs)
            raise self._broken

    def _disagreement(self, peer: int, call: int, mine: bytes, theirs: bytes) -> CommunicationError:
        """Exchange places with a peer that makes another call, and return the error."""
        self._broken = CommunicationError("a former call of this group failed")  # while signals are taken
        where = here()
        for other in self._sockets:
            with suppress(OSError):
                self._send(other, SIGNAL.pack(PLACE, call, 0, 0) + where.encode()[:LONGEST])
        until = time.monotonic() + MANNERS
        while peer not in self._places and peer not in self._ended and time.monotonic() < until:
            self._receive(self._poll.poll(LOOK / 10))
        sayings = {
            self.names[self.rank]: readable(mine) + where,
            self.names[peer]: readable(theirs) + self._places.get(peer, ""),
        }
        return disagreement(call, sayings)

    def _wait_for(self, peer: int, call: int) -> None:
        """Take signals until the one of `peer` for `call` is here; a peer that ends before its own is named."""
        until = 0.0
        while self._latest[peer] < call:
            if self._broken is not None:
                raise self._broken
            for ended in self._ended:
                self._require(ended, call)
            look = SOON if _flush_all() else LOOK
            arrived = self._poll.poll(min(look, 1000 * self._patience))
            if arrived:
                self._receive(arrived)
                continue
            now = time.monotonic()
            until = until or now + self._patience
            if now >= until:
                raise CommunicationError(
                    f"rank {self.names[peer]} did not reach {self.doing(call)} in {self._patience:.0f} s; it is stuck"
                )

    def _require(self, peer: int, call: int) -> None:
        if self._latest[peer] < call:
            mine = self.names[self.rank]
            raise CommunicationError(
                f"rank {self.names[peer]} ended while rank {mine} waited for it in {self.doing(call)}{here()}"
            )

    def doing(self, call: int) -> str:
        """Return the words of a call that some peer has not made yet."""
        return readable(self._said.get(call, b"")) or f"call {call}"

    def _receive(self, arrived: list[tuple[int, int]]) -> None:
        """Take one signal from each socket that has some; remember the peers that have ended."""
        for descriptor, _ in arrived:
            peer = self._peer_of[descriptor]
            try:
                message, descriptors, _, _ = socket.recv_fds(self._sockets[peer], SIGNAL.size + LONGEST, 1)
            except (
                ConnectionResetError
            ):  # it ended before it read our last signals; its own may still be here
                continue
            if message:
                self._take(peer, message, descriptors)
            else:
                self._ended.add(peer)
                self._poll.unregister(descriptor)

    def _take(self, peer: int, message: bytes, descriptors: list[int]) -> None:
        kind, call, index, nbytes = SIGNAL.unpack_from(message)
        if kind == DONE:
            room = self._reading[call]
            room.readers.discard(peer)
            if not room.readers:
                del self._reading[call]
            return
        if kind == PLACE:
            self._places[peer] = readable(message[SIGNAL.size :])
            return
        self._latest[peer] = call
        if kind == SHARE:
            self._shared[peer, call] = descriptors[0]
        elif kind == READY:
            if descriptors:
                self._theirs[peer, index] = Room(descriptors[0], nbytes, index)
                os.close(descriptors[0])
            self._announced[peer, call] = self._theirs[peer, index]
        self._compare(peer, call, message[SIGNAL.size :])

    def _send(self, peer: int, message: bytes, *descriptors: int) -> None:
        """Send a signal, after those that are kept; it is kept too where the socket is full."""
        kept = self._kept[peer]
        with _ONE:
            if kept or not _is_sent(self._sockets[peer], (message, descriptors)):
                kept.append((message, [os.dup(one) for one in descriptors]))
                _BEHIND.add(self)

    def flush(self) -> None:
        """Send what was kept, as far as the sockets take it; who has ended need not know."""
        with _ONE:
            for peer, kept in self._kept.items():
                try:
                    _send_kept(self._sockets[peer], kept)
                except ConnectionError:
                    _forget(kept)
            if not any(self._kept.values()):
                _BEHIND.discard(self)

    def close(self) -> None:
        """Close the sockets; also done when nobody holds the links any more."""
        self._closing()

    def leave_to_parent(self) -> None:
        """Close a forked child's copies of the sockets, by which its parent's end would not be seen."""
        for link in self._sockets.values():
            link.close()
        self._closing.detach()


Signal = tuple[bytes, Sequence[int]]
"""A message and the file descriptors that go with it."""

_LIVE: weakref.WeakSet[Links] = weakref.WeakSet()
_BEHIND: weakref.WeakSet[Links] = weakref.WeakSet()
"""Links with signals that their sockets have not taken yet."""
_ONE = threading.Lock()
"""Held by the thread that sends: one that waits in a group sends for all of them."""


def _flush_all() -> bool:
    """Send what any group has kept: a peer may wait there while this rank waits here. Tell whether some is left."""
    if _BEHIND:
        with _ONE:
            behind = list(_BEHIND)
        for links in behind:
            links.flush()
    return bool(_BEHIND)


def _leave_to_parent() -> None:
    for links in list(_LIVE):
        links.leave_to_parent()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)


def _is_sent(link: socket.socket, signal: Signal) -> bool:
    """Send a signal (ConnectionError: the peer has ended); False if the socket has no place for it now."""
    message, descriptors = signal
    try:
        socket.send_fds(link, [message], descriptors)
    except BlockingIOError:
        return False
    return True


def _send_kept(link: socket.socket, kept: deque[Signal]) -> None:
    while kept and _is_sent(link, kept[0]):
        _close_all(kept.popleft()[1])


def _forget(kept: deque[Signal]) -> None:
    while kept:
        _close_all(kept.popleft()[1])


def _close_all(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _close(
    sockets: dict[int, socket.socket], descriptors: dict[int, int], kept: dict[int, deque[Signal]]
) -> None:
    """Close the sockets; a peer that still reads gets the signals that were kept for it first."""
    for peer, link in sockets.items():
        link.settimeout(MANNERS)
        with suppress(OSError):
            _send_kept(link, kept[peer])
        _forget(kept[peer])
        link.close()
    _close_all(descriptors.values())


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return libc


def _mapped(descriptor: int, nbytes: int) -> Any:
    """Map shared memory as an array of bytes, until nobody holds it; Python's mmap would keep a descriptor open."""
    address = _libc().mmap(None, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, descriptor, 0)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    mapping = (ctypes.c_char * nbytes).from_address(address)
    weakref.finalize(mapping, _libc().munmap, address, nbytes).atexit = False
    return mapping


@dataclass(frozen=True)
class Neighbours:
    """The ranks of a group that share a host with this one, and who shares which."""

    links: Links
    hosts: tuple[tuple[int, ...], ...]
    """Ranks of the group on each host, as many on one as on the other."""


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
    return found.links if found is not None and len(found.hosts) == 1 else None


def are_near(group: Any) -> bool:
    """Tell whether all ranks of a group are known to share memory; nobody is asked."""
    found = _NEIGHBOURS.get(group)
    return found is not None and len(found.hosts) == 1


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
        os.close(os.memfd_create("deepspeed", os.MFD_CLOEXEC))
    except (AttributeError, OSError):  # musl before 3.10's; a sandbox
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
