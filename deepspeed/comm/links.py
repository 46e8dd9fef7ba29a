"""Signals between the ranks of one host about memory that they share.

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

import errno
import os
import select
import socket
import struct
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta

from deepspeed.comm.calls import LONGEST, disagreement, here, readable
from deepspeed.comm.outbox import Outbox, flush_all
from deepspeed.comm.rooms import Room, failure, new_room
from deepspeed.errors import CommunicationError

SIGNAL = struct.Struct("<cQQQ")  # kind, number of the call, room, bytes of the room; then the call's words
READY, DONE, SHARE, NOTE, PLACE = b"r", b"d", b"s", b"n", b"p"
LOOK = 1000  # milliseconds between two looks at how long a wait lasts
SOON = 5  # the same while signals wait in an outbox
KEPT = 32  # words of calls to keep before looking which are of use no more
MANNERS = 2.0  # seconds for a peer that makes another call to say where


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
        for descriptor in self._peer_of:
            self._poll.register(descriptor, select.POLLIN)
        self._outboxes = {peer: Outbox(link) for peer, link in sockets.items()}
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
        self._closing = weakref.finalize(self, _close, self._outboxes, self._unknown)
        _LIVE.add(self)

    def room(self, nbytes: int) -> Room:
        """Return a room of at least `nbytes` that nobody reads."""
        self.drain()
        free = [one for one in self._rooms if not one.readers and one.nbytes >= nbytes]
        if free:
            return min(free, key=lambda one: one.nbytes)
        try:
            room, descriptor = new_room(nbytes, len(self._rooms))
        except OSError as error:
            mine, unread = self.names[self.rank], sum(bool(one.readers) for one in self._rooms)
            raise failure(
                f"rank {mine} cannot share {nbytes} bytes more, beside those of {unread} calls that are not waited for "
                "everywhere",
                error,
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
                self._outboxes[peer].send(SIGNAL.pack(DONE, call, 0, 0))

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
        flush_all()
        while arrived := self._poll.poll(0):
            self._receive(arrived)

    def _tell(self, signal: bytes, what: bytes, *descriptors: int) -> None:
        """Begin a call: send all peers its signal, and compare it with what was heard of it before."""
        self._said[self._calls] = what
        for peer in self._sockets:
            try:
                self._outboxes[peer].send(signal + what, *descriptors)
            except ConnectionError:
                self._ended.add(peer)
            except OSError as error:
                mine = self.names[self.rank]
                raise failure(
                    f"rank {mine} cannot share memory with rank {self.names[peer]}", error
                ) from error
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
                self._outboxes[other].send(SIGNAL.pack(PLACE, call, 0, 0) + where.encode()[:LONGEST])
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
            look = SOON if flush_all() else LOOK
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
        if kind == SHARE:
            self._shared[peer, call] = self._descriptor(peer, descriptors)
        elif kind == READY:
            if (peer, index) not in self._theirs:
                self._theirs[peer, index] = self._entered(peer, index, nbytes, descriptors)
            self._announced[peer, call] = self._theirs[peer, index]
        self._latest[peer] = call
        self._compare(peer, call, message[SIGNAL.size :])

    def _entered(self, peer: int, index: int, nbytes: int, descriptors: list[int]) -> Room:
        """Map a room that a peer has made."""
        descriptor = self._descriptor(peer, descriptors)
        try:
            return Room(descriptor, nbytes, index)
        except OSError as error:
            raise self._unreachable(peer, error) from error
        finally:
            os.close(descriptor)

    def _descriptor(self, peer: int, descriptors: list[int]) -> int:
        """Return the file descriptor that came with a signal; the system drops it where this process has too many."""
        if not descriptors:
            raise self._unreachable(peer, OSError(errno.EMFILE, os.strerror(errno.EMFILE)))
        return descriptors[0]

    def _unreachable(self, peer: int, error: OSError) -> CommunicationError:
        mine = self.names[self.rank]
        self._broken = failure(f"rank {mine} cannot read what rank {self.names[peer]} shares with it", error)
        return self._broken

    def close(self) -> None:
        """Close the sockets; also done when nobody holds the links any more."""
        self._closing()

    def leave_to_parent(self) -> None:
        """Close a forked child's copies of the sockets: through them its parent would seem to be alive."""
        for link in self._sockets.values():
            link.close()
        self._closing.detach()


def _close(outboxes: dict[int, Outbox], descriptors: dict[int, int]) -> None:
    for outbox in outboxes.values():
        outbox.close(MANNERS)
    for descriptor in descriptors.values():
        os.close(descriptor)


_LIVE: weakref.WeakSet[Links] = weakref.WeakSet()


def _leave_to_parent() -> None:
    for links in list(_LIVE):
        links.leave_to_parent()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)
