"""What this rank sends to its peers over sockets, without ever waiting for them to read."""

from __future__ import annotations

import os
import socket
import threading
import weakref
from collections import deque
from collections.abc import Sequence


class Outbox:
    """The way to one peer. Messages go in order; those that its socket has no place for wait here.

    They leave with the next `flush_all`, which a rank does whenever it waits: the peer may wait for them in one
    group while this rank waits in another.

    Args:
        link: to the peer; only read by others from here on.
    """

    def __init__(self, link: socket.socket) -> None:
        link.setblocking(False)
        self._link = link
        self._waiting: deque[tuple[bytes, list[int]]] = deque()  # messages, and copies of their descriptors

    def __len__(self) -> int:
        """Count the messages that wait."""
        return len(self._waiting)

    def send(self, message: bytes, *descriptors: int) -> None:
        """Send a message and file descriptors now or later (ConnectionError: the peer has ended)."""
        with _SENDING:
            if self._waiting or not self._is_taken(message, descriptors):
                self._waiting.append((message, [os.dup(one) for one in descriptors]))
                _FULL.add(self)

    def flush(self) -> None:
        """Send what waits, as far as the socket takes it; one who has ended needs nothing more."""
        with _SENDING:
            self._send_waiting()
            if not self._waiting:
                _FULL.discard(self)

    def close(self, patience: float) -> None:
        """Close the socket; a peer that still reads gets what waits within so many seconds."""
        _FULL.discard(self)
        self._link.settimeout(patience)
        self._send_waiting()
        self._link.close()

    def _send_waiting(self) -> None:
        try:
            while self._waiting and self._is_taken(*self._waiting[0]):
                self._drop_first()
        except OSError:
            while self._waiting:
                self._drop_first()

    def _is_taken(self, message: bytes, descriptors: Sequence[int]) -> bool:
        try:
            socket.send_fds(self._link, [message], descriptors)
        except BlockingIOError:
            return False
        return True

    def _drop_first(self) -> None:
        for descriptor in self._waiting.popleft()[1]:
            os.close(descriptor)


_FULL: weakref.WeakSet[Outbox] = weakref.WeakSet()
"""Those in which messages wait, of all groups."""

_SENDING = threading.Lock()
"""Held by who sends: a thread that waits in one group sends for all."""


def flush_all() -> bool:
    """Send what waits in any group, as far as sockets take it; tell whether some is left."""
    if _FULL:
        with _SENDING:
            full = list(_FULL)
        for outbox in full:
            outbox.flush()
    return bool(_FULL)
