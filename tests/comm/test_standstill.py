"""Ranks that wait for each other are told apart from ranks that wait."""

import gc
import os
import socket
import sys
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from collectives import ranks_on_hosts
from harness import on_ranks
from toys import make_toy

import deepspeed
from deepspeed import comm
from deepspeed.comm import hosts, neighbours
from deepspeed.comm.standstill import Stillness, Wait, _written, stuck, waiting, watch

HERE, THERE = Wait("barrier", (0, 1, 2)), Wait("all_reduce", (0, 1, 2))


def test_ranks_in_one_call_are_not_stuck():
    assert not stuck({0: HERE, 1: HERE, 2: HERE})


def test_ranks_in_two_calls_of_one_group_are_stuck():
    assert stuck({0: HERE, 1: HERE, 2: THERE}) == {0, 1, 2}


def test_calls_of_groups_apart_do_not_meet():
    left, right = Wait("all_reduce", (0, 1)), Wait("barrier", (2, 3))
    assert not stuck({0: left, 1: left, 2: right, 3: right})


def test_who_waits_for_one_that_can_go_on_is_not_stuck():
    first, second = Wait("all_reduce", (0, 1)), Wait("barrier", (1, 2))
    assert not stuck({0: first, 1: second, 2: second})


def test_a_circle_over_groups_is_stuck():
    waits = {0: Wait("a", (0, 1)), 1: Wait("b", (1, 2)), 2: Wait("c", (2, 0))}
    assert stuck(waits) == {0, 1, 2}


@on_ranks(4)
def test_the_halves_of_an_exchange_among_hosts_are_one_call(monkeypatch):
    def seen():
        found.append(waiting(sys._getframe()))
        raise InterruptedError

    found = []
    with ranks_on_hosts(2):
        work = comm.start_all_gather(torch.empty(4), torch.ones(1), label="weights")
        far, work._far = work._far, SimpleNamespace(wait=lambda timeout: seen())
        with pytest.raises(InterruptedError):
            work.wait()
        work._far = far
        monkeypatch.setattr(hosts.Gather, "wait", lambda self, timeout: seen())
        with pytest.raises(InterruptedError):
            work.wait()
        monkeypatch.undo()
    far, near = found
    assert far.is_with(near)
    assert (far.what, far.ranks) == ("all_gather_single of 1 x float32: weights", (0, 1, 2, 3))


@pytest.mark.parametrize(
    ("spent", "written", "number", "looks"),
    [
        ([1, 1, 1, 1], [0, 10, 20, 30], 0, [0, 1, 2, 3]),
        ([1, 2, 3, 4], [0, 0, 0, 0], 0, [0, 0, 0, 0]),  # one call after the other
        ([1, 2, 3, 4], [0, 0, 0, 0], 7, [0, 1, 2, 3]),  # which numbers tell apart
        ([1, 1, 1, 1], [0, 0, 10**6, 10**6], 0, [0, 1, 0, 1]),  # others may wait for what it sends
        ([1, 1, 1, 1], [0, 0, 10**6, 10**6], 7, [0, 1, 0, 1]),
    ],
)
def test_who_does_nothing_in_one_call_waits(spent, written, number, looks):
    clock, counter = iter(spent), iter(written)
    still = Stillness(lambda: next(clock), lambda: next(counter))
    assert [still.looks(replace(HERE, number=number)) for _ in range(4)] == looks
    assert Stillness(lambda: 0, lambda: 0).looks(None) == 0


def test_what_a_process_sends_is_counted():
    first, second = socket.socketpair()
    with first, second:
        before = _written()
        assert os.write(first.fileno(), b"x" * 50_000) == 50_000
        assert _written() - before >= 50_000


@on_ranks(2)
def test_ranks_share_memory_once_they_have_met():
    group = dist.new_group()
    assert not neighbours.are_near(group)
    comm.barrier(group=group)
    assert neighbours.are_near(group)


def test_who_computes_does_not_wait():
    assert waiting(sys._getframe()) is None


@on_ranks(2)
def test_ranks_that_connect_wait_for_each_other(monkeypatch):
    told, seen = neighbours._told, []

    def looked_at(*args):
        seen.append(waiting(sys._getframe()))
        return told(*args)

    monkeypatch.setattr(neighbours, "_told", looked_at)
    comm.barrier(group=dist.new_group())
    assert {(one.what, one.ranks) for one in seen} == {(neighbours.FIRST.decode(), (0, 1))}


@on_ranks(2)
def test_one_thread_looks_however_many_engines_there_are():
    def once() -> None:
        deepspeed.initialize(
            model=make_toy(),
            config={
                "train_micro_batch_size_per_gpu": 1,
                "optimizer": {"type": "AdamW"},
                "zero_optimization": {"stage": 3},
            },
        )
        gc.collect()

    once()
    watch()
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        once()
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 2
