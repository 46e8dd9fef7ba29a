"""What stage 3 holds is what the layout says, to the byte, and nothing grows or stays behind."""

from __future__ import annotations

import gc
import os
import threading

import psutil
import pytest
import torch
import torch.distributed as dist
from harness import run_on_ranks
from torch import nn
from toys import make_toy, toy_batch
from training import config_for, drive_engine

import deepspeed
from deepspeed.zero.layout import ALIGN

BF16, FP32 = 2, 4
GROWTH = 8 * 2**20  # bytes that an allocator may take for reasons of its own

ROOMS = 4  # descriptors that more shared memory for messages may take


def make_engine(model=None, **zero):
    return deepspeed.initialize(model=model or make_toy(), config=config_for(3, "bf16", 1, 0.5, **zero))[0]


def train(engine, step):
    return drive_engine(engine, [toy_batch(step, 0, dist.get_rank())])


def linear_stack():
    return nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(6))


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = linear_stack()

    def forward(self, hidden):
        for layer in self.layers:
            hidden = layer(hidden).relu() + hidden
        return hidden


def persistent_bytes(ranks):
    engine = make_engine(Stack())
    engine.backward(engine(torch.ones(2, 64)).float().sum())
    engine.step()
    report = engine.memory_report()
    chunk = 64 * 64 // ranks
    assert chunk % ALIGN == 0
    assert report.parameters == 6 * chunk * BF16
    assert report.masters == 6 * chunk * FP32
    moments = 6 * chunk * 2 * FP32
    steps = report.optimizer - moments  # the optimizer's step counters
    assert 0 <= steps <= 6 * 8
    assert report.gradients == report.gathered == 0
    assert "persistent" in str(report)


@pytest.mark.parametrize("ranks", [2, 4])
def test_persistent_bytes_are_those_of_the_layout(ranks):
    run_on_ranks(ranks, persistent_bytes, ranks)


def peak_of_gathered(live):
    engine = make_engine(Stack(), stage3_max_live_parameters=live)
    for _ in range(3):
        engine.backward(engine(torch.ones(2, 64)).float().sum())
        assert engine.memory_report().gathered == 0
        engine.step()
    layer = 64 * 64 * BF16
    assert layer <= engine.memory_report().peak_gathered <= max(live * BF16, layer)


@pytest.mark.parametrize("live", [4096, 2 * 4096, 3 * 4096 + 5])
def test_the_peak_of_gathered_bytes_stays_within_max_live_parameters(live):
    run_on_ranks(2, peak_of_gathered, live)


def gathers_of_a_step(reuse):
    engine = make_engine(Stack(), stage3_max_reuse_distance=reuse)
    counts = []
    for _ in range(4):
        before = engine.memory_report().gathers
        engine.backward(engine(torch.ones(2, 64)).float().sum())
        engine.step()
        counts.append(engine.memory_report().gathers - before)
    assert counts[-1] == (6 if reuse else 11)  # the first layer's backward does not read its weight


@pytest.mark.parametrize("reuse", [0, 10**9])
def test_what_is_soon_used_again_is_gathered_once(reuse):
    run_on_ranks(2, gathers_of_a_step, reuse)


def resources():
    gc.collect()
    return psutil.Process().memory_info().rss, len(os.listdir("/proc/self/fd")), threading.active_count()


def assert_no_growth(before):
    after = resources()
    assert after[0] - before[0] < GROWTH
    assert after[1] - before[1] <= ROOMS
    assert after[2] == before[2]


def nothing_grows():
    engine = make_engine()
    for step in range(40):
        train(engine, step)
    before = resources()
    for step in range(300):
        train(engine, step)
        assert engine.memory_report().gathered == 0
    assert_no_growth(before)


def test_nothing_grows_over_300_steps():
    run_on_ranks(2, nothing_grows)


def everything_comes_back():
    def once(step):
        with deepspeed.zero.Init(config_dict_or_path=config_for(3, "bf16", 1, 0.5)):
            model = make_toy()
        engine = make_engine(model)
        train(engine, step)
        engine.destroy()

    for step in range(5):
        once(step)
    before = resources()
    for step in range(20):
        once(step)
    assert_no_growth(before)


def many_parameters():
    with deepspeed.zero.Init():
        before = len(os.listdir("/proc/self/fd"))
        layers = [nn.Linear(3, 3) for _ in range(200)]
    assert all(layer.weight.ds_numel == 9 for layer in layers)
    assert len(os.listdir("/proc/self/fd")) - before <= ROOMS


def test_parameters_born_sharded_share_descriptors():
    run_on_ranks(2, many_parameters)


def test_twenty_engines_give_everything_back():
    run_on_ranks(2, everything_comes_back)
