"""What users do to parameters between steps counts, or is refused."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from harness import on_ranks, run_on_ranks
from reference import PlainTrainer
from torch import nn
from toys import make_toy, toy_batch, toy_loss
from training import ADAMW, TOLERANCE, assert_equal_training, config_for

import deepspeed
from deepspeed.errors import ConfigError, UsageError
from deepspeed.utils import safe_get_full_fp32_param

STAGES = [0, 1, 2]


def linear_engine(stage=2, model=None, **more):
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "zero_optimization": {"stage": stage},
        **more,
    }
    engine, *_ = deepspeed.initialize(model=model or nn.Linear(3, 2), config=config)
    return engine


def train_one_step(engine):
    engine.backward(engine(torch.ones(2, 3)).float().square().mean())
    engine.step()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_goes_on_from_edited_parameters(stage, precision):
    run_on_ranks(2, edit_and_train, stage, precision)


def edit_and_train(stage, precision):
    """Halve one weight in place, load another from a state dict, then train like plain PyTorch."""
    engine, *_ = deepspeed.initialize(model=make_toy(), config=config_for(stage, precision, 1, 0.0))
    storage = torch.bfloat16 if precision == "bf16" else torch.float32
    make_optimizer = partial(torch.optim.AdamW, **{**ADAMW, "betas": (0.9, 0.95)})
    plain = PlainTrainer(make_toy(), make_optimizer, storage=storage)
    for step in range(4):
        if step == 2:
            for model in (engine.module, plain.working):
                with torch.no_grad():
                    model.blocks[0][1].weight.mul_(0.5)
                    model.gain.copy_(0.25)
                model.head.load_state_dict({"weight": torch.full((11, 6), 0.125)})
            edited = ("blocks.0.1.weight", "gain", "head.weight")
            with torch.no_grad():
                for name in edited:
                    plain.master.get_parameter(name).copy_(plain.working.get_parameter(name))
        plain.step([toy_batch(step, 0, rank) for rank in range(dist.get_world_size())], toy_loss)
        engine.backward(toy_loss(engine, toy_batch(step, 0, dist.get_rank())))
        engine.step()
    assert_equal_training(engine, plain, TOLERANCE[precision])


@on_ranks(2)
def test_a_master_that_is_read_after_an_edit_has_it():
    engine = linear_engine(bf16={"enabled": True})
    train_one_step(engine)
    nn.init.constant_(engine.module.weight, 0.5)
    assert safe_get_full_fp32_param(engine.module.weight).unique().tolist() == [0.5]


def new_data(module):
    module.weight.data = torch.ones(2, 3)


@pytest.mark.parametrize("change", [nn.Module.half, nn.Module.double, new_data])
@on_ranks(1)
def test_replaced_memory_is_an_error_that_names_the_parameter(change):
    engine = linear_engine()
    train_one_step(engine)
    change(engine.module)
    with pytest.raises(UsageError, match=r"weight: expected its memory .* param\.copy_"):
        engine.optimizer.step()


@on_ranks(1)
def test_moving_to_where_it_is_changes_nothing():
    engine = linear_engine()
    engine.to("cpu")
    engine.module.float()
    train_one_step(engine)


@on_ranks(1)
def test_unfrozen_parameters_are_reported(monkeypatch):
    from deepspeed.engine import engine as module

    told = []
    monkeypatch.setattr(module, "warn_once", told.append)
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    engine = linear_engine(model=model)
    train_one_step(engine)
    assert told == []
    model[0].requires_grad_(True)
    train_one_step(engine)
    assert told[0].startswith("0.weight and 1 more require grad now but were frozen")


@on_ranks(1)
def test_a_complex_parameter_is_refused():
    model = nn.Linear(3, 2)
    model.phase = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    with pytest.raises(ConfigError, match=r"phase: expected a real parameter, got torch\.complex64"):
        linear_engine(model=model)


@on_ranks(2)
def test_double_and_single_precision_parameters_train_together():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2).double())
    model.forward = lambda x: model[1](model[0](x).double())
    engine = linear_engine(model=model)
    train_one_step(engine)
    assert engine.get_global_grad_norm() > 0
    assert model[1].weight.dtype is torch.float64


@on_ranks(1)
def test_odd_forms_of_model_parameters():
    model = nn.Linear(3, 2)
    config = {"train_batch_size": 2, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    used = model.parameters()
    list(used)
    with pytest.raises(ConfigError, match="model_parameters: expected parameters to train, got none"):
        deepspeed.initialize(model=model, model_parameters=used, config=config)
    with pytest.raises(ConfigError, match="or param groups, got 'weight'"):
        deepspeed.initialize(model=model, model_parameters=["weight"], config=config)
    evaluates, optimizer, *_ = deepspeed.initialize(
        model=nn.Linear(3, 2), model_parameters=[], config={"train_batch_size": 2}
    )
    assert optimizer is None
    assert evaluates(torch.ones(1, 3)).shape == (1, 2)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.weight, config=config)
    assert [len(unit.params) for unit in engine.optimizer.units] == [1]
