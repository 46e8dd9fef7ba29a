"""Corners that trainers run into: each broke somewhere once."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.zero import partition_parameters
from harness import run_on_ranks
from torch import nn

import deepspeed
from deepspeed.zero import GatheredParameters, Init


def config(stage, **keys):
    return {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.05}},
        **keys,
    }


class Scaled(nn.Module):
    """Has a parameter without dimensions, and one weight under two names."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.temperature = nn.Parameter(torch.tensor(0.5))
        self.first = nn.Linear(6, 6, bias=False)
        self.tied = nn.Linear(6, 6, bias=False)
        self.tied.weight = self.first.weight
        self.register_buffer("offset", torch.tensor(0.25))

    def forward(self, inputs):
        return self.tied(self.first(inputs).tanh()) * self.temperature + self.offset


def steps(model, step, seeds):
    for seed in seeds:
        inputs = torch.randn(2, 6, generator=torch.Generator().manual_seed(seed))
        step(model(inputs).square().mean())


def without_deepspeed(seeds):
    model = Scaled()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0)

    def step(loss):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    steps(model, step, seeds)
    return dict(model.named_parameters())


def numbers_without_dimensions(stage, folder):
    def make():
        with Init(config_dict_or_path=config(stage), enabled=stage == 3):
            model = Scaled()
        return deepspeed.initialize(model=model, config=config(stage))[0]

    def train(engine, seeds):
        steps(engine, lambda loss: (engine.backward(loss), engine.step()), seeds)

    engine = make()
    train(engine, range(2))
    engine.save_checkpoint(folder)
    again = make()
    again.load_checkpoint(folder)
    train(again, range(2, 4))
    expected = without_deepspeed(range(4))
    for name, param in again.module.named_parameters():
        with GatheredParameters(param):
            torch.testing.assert_close(param.data, expected[name].data, rtol=1e-5, atol=1e-6)
    with GatheredParameters(again.module.temperature, modifier_rank=0):
        assert again.module.temperature.shape == ()
        if dist.get_rank() == 0 or stage < 3:  # below it nothing is gathered, nor sent
            again.module.temperature.data.fill_(3.0)
    with GatheredParameters(again.module.temperature):
        assert again.module.temperature.item() == 3.0
    engine.destroy()
    again.destroy()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_parameters_without_dimensions(stage, tmp_path):
    run_on_ranks(2, numbers_without_dimensions, stage, str(tmp_path))


def constructors_pass_through_the_global():
    seen = []
    original = partition_parameters.zero_wrapper_for_fp_tensor_constructor

    def watched(function, *args, **kwargs):
        seen.append((function is partition_parameters._orig_torch_arange, kwargs["target_device"]))
        return original(function, *args, **kwargs)

    partition_parameters.zero_wrapper_for_fp_tensor_constructor = watched
    try:
        with Init(config_dict_or_path=config(3, bf16={"enabled": True})):
            assert torch.arange(3.0).dtype == torch.bfloat16
            torch.zeros(2)
    finally:
        partition_parameters.zero_wrapper_for_fp_tensor_constructor = original
    assert [is_arange for is_arange, _ in seen].count(True) == 1
    assert all(torch.device(device) for _, device in seen)
    seen.clear()
    with Init(config_dict_or_path=config(3)):
        torch.arange(3.0)
    assert seen == []


def test_what_wraps_constructors_is_looked_up_when_init_is_entered():
    run_on_ranks(1, constructors_pass_through_the_global)


def unordered():
    with Init(config_dict_or_path=config(3)):
        model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)), nn.BatchNorm1d(4))
    tensors = list(model.state_dict(keep_vars=True).values())
    if dist.get_rank() == 1:
        tensors.reverse()
    with GatheredParameters([*tensors, None, tensors[0]], modifier_rank=0):
        if dist.get_rank() == 0:
            for param in model.parameters():
                param.data.fill_(7.0)
    with GatheredParameters(model.parameters()):
        assert all((param == 7).all() for param in model.parameters())


def test_parameters_and_buffers_come_in_another_order_on_each_rank():
    run_on_ranks(2, unordered)


def asked_for_what_is_not_there(folder):
    engine, *_ = deepspeed.initialize(model=Scaled(), config=config(3))
    state = engine._zero3_consolidated_16bit_state_dict()
    if dist.get_rank() == 0:
        assert {*state} == {"temperature", "first.weight", "tied.weight", "offset"}
        assert state["tied.weight"].data_ptr() == state["first.weight"].data_ptr()
    else:
        assert state is None
    assert engine.load_checkpoint(folder) == (None, None)
    engine.destroy()
    engine, *_ = deepspeed.initialize(model=Scaled(), config=config(2))
    for ask in (engine._zero3_consolidated_16bit_state_dict, engine._consolidated_16bit_state_dict):
        with pytest.raises(ValueError, match="stage"):
            ask()
    engine.destroy()


def test_whole_weights_are_the_first_ranks_and_a_missing_checkpoint_is_no_error(tmp_path):
    run_on_ranks(2, asked_for_what_is_not_there, str(tmp_path / "nothing"))


def test_one_process_without_a_launcher_is_a_job_of_its_own():
    script = "import deepspeed; deepspeed.init_distributed(); print(deepspeed.comm.get_world_size())"
    launched = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in launched}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.stdout.strip() == "1", done.stderr


def schedule_alone(stage):
    schedule = {"type": "WarmupLR", "params": {"warmup_num_steps": 5}}
    asked = config(stage, scheduler=schedule)
    del asked["optimizer"]
    engine, optimizer, _, scheduler = deepspeed.initialize(model=Scaled(), config=asked)
    assert scheduler is None
    assert engine.lr_scheduler is None
    assert optimizer is engine.optimizer
    engine.eval()
    with torch.no_grad():
        assert engine(torch.zeros(2, 6)).shape == (2, 6)
    engine.destroy()


@pytest.mark.parametrize("stage", [0, 3])
def test_a_schedule_without_an_optimizer_is_left_alone(stage):
    run_on_ranks(1, schedule_alone, stage)


def copies_are_plain():
    with Init(config_dict_or_path=config(3)):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with GatheredParameters(model.parameters()):
        kept = copy.deepcopy(model[0])
        other = nn.Parameter(model[1].weight.detach() * 2)
    assert type(kept.weight.data) is torch.Tensor
    assert not hasattr(kept.weight, "ds_id")
    assert kept(torch.ones(1, 4)).shape == (1, 4)  # outside, whole
    with GatheredParameters(model[1].weight):
        model[1].weight = other
    assert model[1].weight is other
    engine, *_ = deepspeed.initialize(model=model, config=config(3))
    with GatheredParameters(engine.module.parameters()):
        torch.testing.assert_close(engine.module[1].weight.data, other.data)
    engine.destroy()


def test_copies_and_replacements_made_of_gathered_parameters():
    run_on_ranks(2, copies_are_plain)
