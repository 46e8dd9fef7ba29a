"""Ways that data takes elsewhere: where ranks cannot read each other's memory, and among hosts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

import deepspeed.zero.holder
from deepspeed.comm import hosts, links


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
    name = links._host
    _forget_neighbours()
    links._host = lambda: f"host {dist.get_rank() // each}"
    try:
        yield
    finally:
        links._host = name
        _forget_neighbours()


def _forget_neighbours() -> None:
    links._NEIGHBOURS.clear()
    hosts._HOSTS.clear()
