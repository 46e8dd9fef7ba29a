"""Settings that an engine acts on."""

import re

import pytest
import torch
from harness import on_ranks
from torch import nn

import deepspeed
from deepspeed.errors import UsageError


def config(**more):
    return {"train_batch_size": 4, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}, **more}


@on_ranks(2)
def test_a_parameter_without_gradient_is_an_error_when_asked():
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "spare": nn.Linear(3, 2)})
    model.forward = lambda x: model["used"](x)
    settings = config(zero_optimization={"stage": 2, "ignore_unused_parameters": False})
    engine, *_ = deepspeed.initialize(model=model, config=settings)
    engine.backward(engine(torch.ones(2, 3)).mean())
    with pytest.raises(UsageError, match=r"got none for spare\.weight, spare\.bias; freeze them"):
        engine.step()


@on_ranks(1)
def test_the_state_is_dumped_when_asked():
    import contextlib
    import io

    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        deepspeed.initialize(model=nn.Linear(3, 2), config=config(dump_state=True, bf16={"enabled": True}))
    text = shown.getvalue()
    assert re.search(r"elements\s+storage\s+compute\s+reduce\s+accumulate\s+master", text)
    assert re.search(r"8\s+bf16\s+bf16\s+bf16\s+fp32\s+fp32", text)
    assert "effective configuration" in text


@on_ranks(1)
def test_a_bucket_size_bounds_the_units():
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(4)))
    for name in ("reduce_bucket_size", "allgather_bucket_size"):
        engine, *_ = deepspeed.initialize(
            model=model, config=config(zero_optimization={"stage": 1, name: 128})
        )
        assert [len(unit.params) for unit in engine.optimizer.units] == [2, 2]
