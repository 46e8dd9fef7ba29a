"""Optimizers are judged by what they do."""

from __future__ import annotations

import pytest
import torch

from deepspeed.ops.probe import ELEMENTWISE, is_elementwise, is_per_parameter


class SignMomentum(torch.optim.Optimizer):
    """Element-wise, and unknown to the table."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                state["m"] = state.get("m", torch.zeros_like(param)).lerp(param.grad, 0.5)
                param.sub_(group["lr"] * state["m"].sign())


class RowNorm(torch.optim.Optimizer):
    """Looks at rows of a matrix (like Adafactor, Shampoo)."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for param in group["params"]:
                norm = param.grad.reshape(param.shape[0], -1).norm(dim=1)
                param.sub_(group["lr"] * param.grad / norm.view(-1, *[1] * (param.dim() - 1)))


class GlobalNorm(torch.optim.Optimizer):
    """Looks at all parameters together."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        params = [param for group in self.param_groups for param in group["params"]]
        norm = torch.stack([param.grad.norm() for param in params]).norm()
        for param in params:
            param.sub_(self.param_groups[0]["lr"] * param.grad / norm)


def fresh(cls, **options):
    return cls([torch.nn.Parameter(torch.ones(2, 2))], **options)


@pytest.mark.parametrize("cls", ELEMENTWISE)
def test_the_table_holds_what_the_probe_finds(cls):
    renamed = type("Renamed", (cls,), {})
    assert is_elementwise(fresh(renamed, lr=0.1))


@pytest.mark.parametrize(
    ("optimizer", "elementwise", "per_parameter"),
    [
        (fresh(SignMomentum, lr=0.1), True, True),
        (fresh(RowNorm, lr=0.1), False, True),
        (fresh(GlobalNorm, lr=0.1), False, False),
        (fresh(torch.optim.Adafactor, lr=0.1), False, True),
        (fresh(torch.optim.LBFGS, lr=0.1), False, False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_kinds(optimizer, elementwise, per_parameter):
    assert is_elementwise(optimizer) is elementwise
    assert is_per_parameter(optimizer) is per_parameter


def test_the_probe_leaves_optimizer_and_random_state_alone():
    optimizer = fresh(RowNorm, lr=0.1)
    params, before = optimizer.param_groups[0]["params"], torch.get_rng_state()
    is_elementwise(optimizer)
    is_per_parameter(optimizer)
    assert optimizer.param_groups[0]["params"] is params
    assert torch.equal(params[0], torch.ones(2, 2))
    assert not optimizer.state
    assert torch.equal(torch.get_rng_state(), before)
