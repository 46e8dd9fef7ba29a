"""Gathers as they go where ranks cannot read each other's memory: on GPUs and among hosts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import deepspeed.zero.holder


@contextmanager
def gathers_are_collectives() -> Iterator[None]:
    """Within, no arena is found, so that units are gathered by collectives."""
    found = deepspeed.zero.holder.arena_of
    deepspeed.zero.holder.arena_of = lambda group: None
    try:
        yield
    finally:
        deepspeed.zero.holder.arena_of = found
