"""Optimizers are judged by what they do."""

from __future__ import annotations

import pytest
import torch

from deepspeed.ops.probe import ELEMENTWISE, is_elementwise, is_per_parameter, state_keys


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


class Attributes(SignMomentum):
    """Keeps a setting and a counter on the instance."""

    def __init__(self, params, lr):
        super().__init__(params, lr)
        self.half, self.log = 0.5, {"steps": 0}

    def step(self):
        self.log["steps"] += 1
        for group in self.param_groups:
            for param in group["params"]:
                param.data.sub_(group["lr"] * self.half * param.grad)


class Flagged(RowNorm):
    """Looks at rows in groups that say so, else at elements."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for param in group["params"]:
                norm = param.grad.reshape(param.shape[0], -1).norm(dim=-1) if group.get("rows") else 1.0
                param.sub_(
                    group["lr"] * param.grad / torch.as_tensor(norm).view(-1, *[1] * (param.dim() - 1))
                )


class Wrapper(torch.optim.Optimizer):
    """Steps another optimizer, which has the real parameters."""

    def __init__(self, params, lr):
        params = list(params)
        super().__init__(params, {"lr": lr})
        self.inner = torch.optim.SGD(params, lr=lr)

    def step(self):
        self.inner.step()


class Dropout(SignMomentum):
    """Draws random numbers."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for param in group["params"]:
                param.sub_(group["lr"] * param.grad * torch.rand_like(param))


def test_settings_on_the_instance_count_and_stay():
    optimizer = fresh(Attributes, lr=0.1)
    assert is_elementwise(optimizer)
    assert optimizer.log == {"steps": 0}


def test_every_param_group_is_judged():
    plain, rows = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2, 2))
    assert is_elementwise(Flagged([{"params": [plain]}, {"params": [rows], "lr": 0.2}], lr=0.1))
    mixed = Flagged([{"params": [plain]}, {"params": [rows], "rows": True}], lr=0.1)
    assert not is_elementwise(mixed)
    assert is_per_parameter(mixed)


def test_a_wrapped_optimizer_is_not_run():
    weight = torch.nn.Parameter(torch.ones(2, 2))
    weight.grad = torch.ones(2, 2)
    optimizer = Wrapper([weight], lr=0.1)
    assert not is_elementwise(optimizer)
    assert not is_per_parameter(optimizer)
    assert torch.equal(weight, torch.ones(2, 2))


def test_hooks_and_schedules_on_the_instance_are_not_called():
    optimizer, calls = fresh(SignMomentum, lr=0.1), []
    optimizer.register_step_pre_hook(lambda *args: calls.append("pre"))
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    assert is_elementwise(optimizer)
    assert not calls
    assert not getattr(optimizer, "_opt_called", False)


def test_random_draws_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    assert not is_elementwise(fresh(Dropout, lr=0.1))
    assert torch.equal(torch.get_rng_state(), before)


TORCH = [
    value
    for name, value in vars(torch.optim).items()
    if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and name != "Optimizer"
]


@pytest.mark.parametrize("cls", TORCH, ids=lambda cls: cls.__name__)
def test_torchs_own_optimizers(cls):
    by_matrix = cls.__name__ in ("Adafactor", "Muon")
    of_no_use = cls.__name__ in ("LBFGS", "SparseAdam")  # a closure, sparse gradients
    assert is_elementwise(fresh(cls, lr=0.1)) is not (by_matrix or of_no_use)
    assert is_per_parameter(fresh(cls, lr=0.1)) is not of_no_use


def test_the_keys_of_states_are_those_that_a_step_makes():
    assert state_keys(fresh(torch.optim.AdamW, lr=0.1)) == {"exp_avg", "exp_avg_sq", "step"}
    assert state_keys(fresh(torch.optim.SGD, lr=0.1)) == set()
    assert state_keys(fresh(torch.optim.LBFGS, lr=0.1)) is None
