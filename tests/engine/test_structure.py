"""A model that is changed after initialize, or belongs to another engine, is an error that names what."""

from __future__ import annotations

import pytest
import torch
from harness import on_ranks
from torch import nn

import deepspeed
from deepspeed.errors import ConfigError, UsageError

CONFIG = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}


def make_model():
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))


def make_engine(model, stage=0):
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    return deepspeed.initialize(model=model, config={**CONFIG, "zero_optimization": zero})[0]


@on_ranks(2)
def test_a_module_replaced_after_initialize_is_named():
    for stage in (0, 3):
        engine = make_engine(make_model(), stage)
        engine.module[1][0] = nn.Linear(4, 4)
        engine.backward(engine(torch.ones(1, 4)).sum())
        with pytest.raises(UsageError, match=r"^1\.0: expected what was there at deepspeed\.initialize"):
            engine.step()


@on_ranks(2)
def test_a_parameter_replaced_after_initialize_is_named():
    for stage in (0, 3):
        engine = make_engine(make_model(), stage)
        engine.module[0].bias = nn.Parameter(torch.zeros(4))
        engine.backward(engine(torch.ones(1, 4)).sum())
        with pytest.raises(UsageError, match=r"^0\.bias: expected what was there"):
            engine.step()


@on_ranks(1)
def test_a_frozen_part_may_be_replaced():
    model = make_model()
    model[0].requires_grad_(False)
    engine = make_engine(model)
    engine.module[0].weight = nn.Parameter(torch.ones(4, 4), requires_grad=False)
    engine.backward(engine(torch.ones(1, 4)).sum())
    engine.step()


@on_ranks(1)
def test_a_parameter_belongs_to_one_engine():
    first = make_model()
    second = nn.Sequential(first[0], nn.Linear(4, 2))
    engine = make_engine(first)
    with pytest.raises(ConfigError, match=r"^0\.weight: expected a parameter that no engine trains"):
        make_engine(second)
    engine.destroy()
    make_engine(second)


@on_ranks(1)
def test_a_model_on_the_meta_device_is_refused():
    with deepspeed.OnDevice(dtype=torch.bfloat16, device="meta"):
        model = make_model()
    assert all(param.is_meta and param.dtype is torch.bfloat16 for param in model.parameters())
    with pytest.raises(ConfigError, match=r"^0\.weight: expected a parameter with values"):
        make_engine(model)
