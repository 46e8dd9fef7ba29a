"""States of an idle engine can be moved away and brought back; training goes on as if nothing had happened."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum, OffloadStateTypeEnum
from harness import run_on_ranks
from toys import make_toy, toy_batch
from training import config_for, drive_engine

import deepspeed
from deepspeed.errors import NotBuiltError, UsageError


def make_engine(stage):
    return deepspeed.initialize(model=make_toy(), config=config_for(stage, "bf16", 1, 0.5))[0]


def train(engine, steps):
    for step in steps:
        drive_engine(engine, [toy_batch(step, 0, dist.get_rank())])


def moved_and_back(stage, include):
    engine, still = make_engine(stage), make_engine(stage)
    train(engine, range(2))
    train(still, range(2))
    before = engine.memory_report()
    engine.offload_states(include=include, device=OffloadDeviceEnum.cpu)
    states = [one for state in engine.optimizer.state.values() for one in state.values() if one.dim() > 0]
    assert all(one.untyped_storage().nbytes() == 0 for one in states)
    with pytest.raises(UsageError, match=r"call engine\.reload_states\(\) first"):
        engine(toy_batch(0, 0, 0)[0])
    with pytest.raises(UsageError, match="away already"):
        engine.optimizer.offload_states()
    engine.reload_states()
    assert engine.memory_report() == before
    train(engine, range(2, 4))
    train(still, range(2, 4))
    ours, theirs = engine.module_state_dict(), still.module_state_dict()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize(
    "include", [None, [OffloadStateTypeEnum.optim_states, "hp_params"]], ids=["all", "optimizer and masters"]
)
def test_states_that_were_away_are_back(stage, include):
    run_on_ranks(2, moved_and_back, stage, include)


def refused():
    engine = make_engine(3)
    with pytest.raises(NotBuiltError, match=r"device: expected cpu, got nvme"):
        engine.offload_states(device="nvme")
    with pytest.raises(UsageError, match=r"include: expected some of optim_states, .*, got 'all'"):
        engine.offload_states(include=["all"])
    engine.reload_states()


def test_what_cannot_be_moved_is_named():
    run_on_ranks(1, refused)
