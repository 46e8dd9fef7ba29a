"""Ways that data takes elsewhere: where ranks cannot read each other's memory, and among hosts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

import deepspeed.zero.holder
from deepspeed.comm import hosts, neighbours


@contextmanager
def gathers_are_collectives() -> Iterator[None]:
    """Within, no arena is found, so that units are gathered by collectives."""
    found = deepspeed.zero.holder.arena_of
    deepspeed.zero.holder.arena_of = lambda group: None
    try:
        yield
    finally:
        deepspeed.zero.holder.arena_of = found


@contextmanager
def ranks_on_hosts(each: int) -> Iterator[None]:
    """Within, groups that exchange something for the first time find `each` ranks on a host, in rank order."""
    name = neighbours._host
    _forget_neighbours()
    neighbours._host = lambda: f"host {dist.get_rank() // each}"
    try:
        yield
    finally:
        neighbours._host = name
        _forget_neighbours()


def _forget_neighbours() -> None:
    neighbours._NEIGHBOURS.clear()
    hosts._HOSTS.clear()
