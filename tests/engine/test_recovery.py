"""What an engine survives: backwards that raise, cleared hooks, changed accumulation, wrong arguments."""

from __future__ import annotations

import gc
import warnings
import weakref

import pytest
import torch
from harness import on_ranks
from torch import nn

import deepspeed
from deepspeed.errors import ConfigError

CONFIG = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_clipping": 0,
    "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
}


def make_engine(model=None, **config):
    return deepspeed.initialize(model=model or nn.Linear(4, 2), config={**CONFIG, **config})[0]


def data():
    return torch.arange(16.0).view(4, 4) / 16


@on_ranks(2)
def test_training_goes_on_after_a_backward_that_raised():
    engine = make_engine(zero_optimization={"stage": 1})
    out = engine(data())
    out.register_hook(lambda grad: (_ for _ in ()).throw(MemoryError("caught and skipped")))
    with pytest.raises(MemoryError):
        (out.sum() + engine.module.weight.sum()).backward()
    before = engine.module.weight.detach().clone()
    engine(data()).sum().backward()
    engine.step()
    grad = data().sum(0).expand(2, 4)
    torch.testing.assert_close(engine.module.weight.detach(), before - 0.1 * grad)


@on_ranks(1)
def test_a_module_whose_hooks_were_cleared_can_be_initialized_again():
    model = nn.Linear(4, 2)
    make_engine(model)
    for part in model.modules():
        part._forward_hooks.clear()
    engine = make_engine(model)
    before = model.weight.detach().clone()
    engine.backward(engine(data()).sum())
    engine.step()
    assert not torch.equal(model.weight.detach(), before)


@on_ranks(1)
def test_zero_grad_keeps_micro_batches_that_the_user_said_are_not_the_last():
    engine = make_engine()
    before = engine.module.weight.detach().clone()
    for last in (False, True):
        engine.set_gradient_accumulation_boundary(last)
        engine.zero_grad()
        engine.backward(engine(data()).sum())
    engine.step()
    torch.testing.assert_close(engine.module.weight.detach(), before - 0.2 * data().sum(0).expand(2, 4))


@on_ranks(1)
def test_accumulation_changed_between_updates_counts_from_the_last_one():
    engine = make_engine(gradient_accumulation_steps=4)
    for _ in range(4):
        engine.backward(engine(data()).sum())
        engine.step()
    engine.set_train_batch_size(12)  # three micro-batches of 4
    boundaries = []
    for _ in range(3):
        engine.backward(engine(data()).sum())
        boundaries.append(engine.is_gradient_accumulation_boundary())
        engine.step()
    assert boundaries == [False, False, True]
    assert engine.global_steps == 2


@on_ranks(1)
def test_autograd_grad_changes_nothing_and_needs_no_scaled_loss():
    engine = make_engine(fp16={"enabled": True, "initial_scale_power": 4})
    inputs = data().half().requires_grad_()
    (penalty,) = torch.autograd.grad(engine(inputs).sum(), inputs)
    torch.testing.assert_close(
        penalty.float(), engine.module.weight.detach().sum(0).expand(4, 4).float(), atol=1e-3, rtol=0
    )
    engine.backward(engine(inputs.detach()).sum())
    engine.step()
    assert engine.was_step_applied()


@on_ranks(1)
def test_an_engine_that_nobody_holds_is_freed():
    engine = make_engine()
    engine.backward(engine(data()).sum())
    engine.step()
    gone = weakref.ref(engine)
    del engine
    gc.collect()
    assert gone() is None


@on_ranks(1)
def test_accumulation_of_one_rank_is_not_rounded_on_the_way():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    engine = make_engine(model, bf16={"enabled": True}, gradient_accumulation_steps=2)
    for value in (1.0, 2**-9):  # their sum has no bf16
        engine.backward(engine(torch.full((1, 1), 2 * value)).sum())
        engine.step()
    master = deepspeed.utils.safe_get_full_fp32_param(model.weight)
    torch.testing.assert_close(master.item(), -0.1 * (1 + 2**-9), rtol=1e-6, atol=0)


@on_ranks(1)
def test_a_callable_is_given_the_parameters_themselves():
    model = nn.Linear(4, 2)
    seen = []

    def make(params):
        seen.extend(params)
        return torch.optim.SGD(seen, lr=0.1)

    deepspeed.initialize(model=model, model_parameters=model.parameters(), optimizer=make, config=CONFIG)
    assert [id(param) for param in seen] == [id(param) for param in model.parameters()]


@on_ranks(1)
def test_torch_schedules_on_a_fused_client_optimizer_do_not_warn():
    model = nn.Linear(4, 2)
    optimizer = deepspeed.ops.adam.FusedAdam(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    config = {"train_micro_batch_size_per_gpu": 4}
    engine = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=config)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            engine.backward(engine(data()).sum())
            engine.step()
    assert engine.get_lr() == [0.0025]


@on_ranks(1)
def test_an_auto_micro_batch_comes_from_the_loader():
    dataset = torch.utils.data.TensorDataset(data())
    loader = torch.utils.data.DataLoader(dataset, batch_size=2)
    config = {**CONFIG, "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto"}
    engine, _, ours, _ = deepspeed.initialize(model=nn.Linear(4, 2), training_data=loader, config=config)
    assert engine.get_batch_info() == (2, 2, 1)
    assert len(ours) == 2


WRONG = [
    ("model", 3),
    ("optimizer", "adam"),
    ("optimizer", lambda params: None),
    ("lr_scheduler", 3),
    ("lr_scheduler", lambda optimizer: None),
    ("model_parameters", 3),
    ("model_parameters", [{"lr": 1}]),
    ("model_parameters", [{"params": 3}]),
    ("training_data", 3),
    ("mesh_param", 3),
    ("mpu", 3),
    ("collate_fn", 3),
]


@on_ranks(1)
def test_a_wrong_argument_is_named():
    for name, value in WRONG:
        arguments = {"model": nn.Linear(4, 2), "config": CONFIG, name: value}
        with pytest.raises(ConfigError, match=rf"^{name}: expected"):
            deepspeed.initialize(**arguments)
