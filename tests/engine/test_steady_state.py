"""Steps leave nothing behind: tensors, objects and memory of Python are after step 30 what they were after step 5."""

from __future__ import annotations

import gc
import tracemalloc
from itertools import pairwise
from statistics import median
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from harness import run_on_ranks
from toys import make_toy, toy_batch
from training import config_for, drive_engine

import deepspeed
from deepspeed.comm.rooms import PAGE, Room

FIRST, LAST, EVERY = 5, 30, 5
LARGE = 512
"""Bytes of a block of Python's memory that counts. Tables of small caches have some from time to time."""
ENOUGH = 4
"""Rooms that may be made late, of a page each: the toy's messages are small."""
OF_A_ROOM = 10
"""Objects of a room: its tensor, mapping, readers and places in dictionaries."""


class Left(NamedTuple):
    """What is there between two steps."""

    tensors: int
    tensor_bytes: int
    objects: int
    traced_bytes: int
    rooms: int
    """To exchange data in; a rank that is ahead of the others makes another one, until there are enough."""


def left() -> Left:
    gc.collect()
    objects = gc.get_objects()
    tensors = [one for one in objects if issubclass(type(one), torch.Tensor)]
    rooms = sum(type(one) is Room for one in objects)
    storages = {one.untyped_storage()._cdata: one.untyped_storage().nbytes() for one in tensors}
    traces = tracemalloc.take_snapshot().traces
    traced = sum(trace.size for trace in traces if trace.size >= LARGE)
    return Left(len(tensors), sum(storages.values()), len(objects), traced, rooms)


def steps_leave_nothing(stage: int, gas: int, precision: str) -> None:
    engine, *_ = deepspeed.initialize(model=make_toy(), config=config_for(stage, precision, gas, 0.5))
    rank, found = dist.get_rank(), []
    gc.collect()
    gc.freeze()  # what is there already is not looked at each time
    tracemalloc.start()
    try:
        for step in range(1, LAST + 1):
            drive_engine(engine, [toy_batch(step, micro, rank) for micro in range(gas)])
            if step >= FIRST and step % EVERY == 0:
                found.append(left())
    finally:
        tracemalloc.stop()
        gc.unfreeze()
    engine.destroy()
    # What other threads hold for a moment, and what is made once and kept, is not what grows with the steps.
    most, least = Left(*map(max, *found[:3])), Left(*map(min, *found[3:]))
    made = max(0, least.rooms - most.rooms)
    assert made <= ENOUGH, found
    assert least.tensors <= most.tensors + made, found
    assert least.tensor_bytes <= most.tensor_bytes + made * PAGE, found
    assert least.objects <= most.objects + len(found) + made * OF_A_ROOM, found  # each look is an object
    grown = [after.traced_bytes - before.traced_bytes for before, after in pairwise(found)]
    assert median(grown) < EVERY * LARGE, found  # a table that grows once is no block that stays in each step


@pytest.mark.parametrize("gas", [1, 3])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_steps_leave_nothing_behind(stage, gas):
    run_on_ranks(2, steps_leave_nothing, stage, gas, "bf16")


def test_steps_in_fp32_leave_nothing_behind():
    run_on_ranks(2, steps_leave_nothing, 2, 1, "fp32")
