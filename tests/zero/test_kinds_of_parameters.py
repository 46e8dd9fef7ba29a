"""Bytes, several dtypes in one model, and two models at once train at stage 3 as they do at stage 0."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from harness import run_on_ranks
from torch import nn
from training import config_for

import deepspeed


class Quantised(nn.Module):
    """A frozen layer of bytes with a scale, and a trained low-rank update of it."""

    def __init__(self):
        super().__init__()
        self.bytes = nn.Parameter(torch.randint(0, 255, (16, 16), dtype=torch.uint8), requires_grad=False)
        self.scale = nn.Parameter(torch.full((16, 1), 0.01), requires_grad=False)
        self.down, self.up = nn.Linear(16, 4, bias=False), nn.Linear(4, 16, bias=False)

    def forward(self, inputs):
        weight = (self.bytes.to(inputs.dtype) - 128) * self.scale.to(inputs.dtype)
        return nn.functional.linear(inputs, weight) + self.up(self.down(inputs))


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.narrow, self.plain = nn.Linear(16, 16).bfloat16(), nn.Linear(16, 16)
        self.wide = nn.Linear(16, 1).double()

    def forward(self, inputs):
        return self.wide(self.plain(self.narrow(inputs.bfloat16()).float()).double())


def trained(make, stage, precision):
    torch.manual_seed(1)
    engine = deepspeed.initialize(model=make(), config=config_for(stage, precision, 1, 0.5))[0]
    for step in range(3):
        torch.manual_seed(10 * step + dist.get_rank())
        engine.backward(engine(torch.randn(2, 16)).float().square().mean())
        engine.step()
    return {name: value.clone() for name, value in engine.module_state_dict().items()}


def the_same_at_every_stage(make, precision):
    whole, sharded = (trained(make, stage, precision) for stage in (0, 3))
    for name, value in whole.items():
        assert sharded[name].dtype == value.dtype
        torch.testing.assert_close(sharded[name], value, rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize(("make", "precision"), [(Quantised, "bf16"), (Mixed, "fp32")])
def test_dtypes_stay_and_results_are_the_same(make, precision):
    run_on_ranks(2, the_same_at_every_stage, make, precision)


def student_and_teacher():
    def make(stage, **options):
        config = {**config_for(stage, "fp32", 1, 0), **options}
        return deepspeed.initialize(model=nn.Linear(8, 8), config=config)[0]

    frozen = config_for(3, "fp32", 1, 0)
    del frozen["optimizer"]
    teacher = deepspeed.initialize(model=nn.Linear(8, 8), config=frozen)[0].eval()
    first, second = make(2), make(3)
    inputs = torch.linspace(-1, 1, 16).view(2, 8)
    losses = []
    for _ in range(20):
        with torch.no_grad():
            target = teacher(inputs)
        loss = (second(first(inputs)) - target).square().mean()
        loss.backward()
        first.step()
        second.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert teacher.memory_report().gathered == second.memory_report().gathered == 0


def test_one_loss_through_two_engines_beside_a_sharded_teacher():
    run_on_ranks(2, student_and_teacher)
