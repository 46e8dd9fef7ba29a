"""Gradients come to the same step however the user runs backward."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from harness import on_ranks, run_on_ranks
from torch import nn
from toys import make_toy, toy_batch, toy_loss
from training import TOLERANCE, assert_equal_training, config_for, train_both

import deepspeed
from deepspeed.comm.rooms import SWITCH
from deepspeed.errors import UsageError
from deepspeed.zero.access import safe_get_full_grad, safe_set_full_grad

STAGES = [0, 1, 2]


def plain_backward(engine, batches):
    losses = []
    for batch in batches:
        loss = toy_loss(engine, batch)
        (loss / len(batches)).backward()
        engine.step()
        losses.append(loss.detach())
    return losses


def without_sync(engine, batches):
    losses = []
    for batch in batches[:-1]:
        with engine.no_sync():
            loss = toy_loss(engine, batch)
            engine.backward(loss)
        engine.step()
        losses.append(loss.detach())
    loss = toy_loss(engine, batches[-1])
    engine.backward(loss)
    engine.step()
    return [*losses, loss.detach()]


def no_sync_to_the_end(engine, batches):
    losses = []
    for batch in batches:
        with engine.no_sync():
            loss = toy_loss(engine, batch)
            engine.backward(loss)
        engine.step()
        losses.append(loss.detach())
    return losses


def explicit_boundary(engine, batches):
    losses = []
    for index, batch in enumerate(batches):
        engine.set_gradient_accumulation_boundary(index == len(batches) - 1)
        loss = toy_loss(engine, batch)
        engine.backward(loss / len(batches), scale_wrt_gas=False)
        engine.step()
        losses.append(loss.detach())
    return losses


def several_backwards(engine, batches):
    losses = []
    for batch in batches:
        loss = toy_loss(engine, batch)
        engine.backward(0.25 * loss, retain_graph=True)
        engine.backward(0.75 * loss)
        engine.step()
        losses.append(loss.detach())
    return losses


def two_forwards_one_backward(engine, batches):
    losses = []
    for batch in batches:
        first, second = toy_loss(engine, batch), toy_loss(engine, batch)
        engine.backward((first + second) / 2)
        engine.step()
        losses.append(first.detach())
    return losses


def through_the_module(engine, batches):
    losses = []
    for batch in batches:
        loss = toy_loss(engine.module, batch)
        (loss / len(batches)).backward()
        engine.step()
        losses.append(loss.detach())
    return losses


def zero_grad_everywhere(engine, batches):
    losses = []
    for batch in batches:
        engine.zero_grad()
        loss = toy_loss(engine, batch)
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach())
    return losses


def failed_forward_between(engine, batches):
    with pytest.raises(IndexError):
        engine(torch.full((1, 4), 99))
    torch.autograd.grad(toy_loss(engine, batches[0]), engine.module.gain)
    return plain_backward(engine, batches)


DRIVES = [
    plain_backward,
    without_sync,
    no_sync_to_the_end,
    explicit_boundary,
    several_backwards,
    two_forwards_one_backward,
    through_the_module,
    zero_grad_everywhere,
    failed_forward_between,
]


def drive_body(name, stage, model):
    drive = next(drive for drive in DRIVES if drive.__name__ == name)
    engine, plain = train_both(config_for(stage, "fp32", 3, 0.5), drive=drive, model=model)
    assert_equal_training(engine, plain, TOLERANCE["fp32"])


@pytest.mark.parametrize("drive", [drive.__name__ for drive in DRIVES])
@pytest.mark.parametrize("stage", STAGES)
def test_any_way_to_run_backward_gives_the_same_training(drive, stage):
    run_on_ranks(2, drive_body, drive, stage, {})


@pytest.mark.parametrize("drive", ["plain_backward", "several_backwards", "two_forwards_one_backward"])
@pytest.mark.parametrize("stage", STAGES)
def test_reentrant_checkpoints_with_tied_weights_too(drive, stage):
    run_on_ranks(2, drive_body, drive, stage, {"checkpointing": "reentrant", "tied": True})


class Router(nn.Module):
    """Two experts; the batch decides which one is used."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.out = nn.Linear(4, 1)

    def forward(self, x, which):
        return self.out(self.experts[which](x)).square().mean()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("bucket", [1, 10**8])
def test_ranks_that_use_different_parameters_do_not_hang(stage, bucket):
    run_on_ranks(2, routed, stage, bucket)


def routed(stage, bucket):
    torch.manual_seed(0)
    model, plain = Router(), Router()
    plain.load_state_dict(model.state_dict())
    reference = torch.optim.AdamW(plain.parameters(), lr=0.05, weight_decay=0.3)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": bucket},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.05, "weight_decay": 0.3}},
    }
    engine, *_ = deepspeed.initialize(model=model, config=config)
    generator = torch.Generator().manual_seed(3)
    for step in range(5):
        data = torch.randn(2, 2, 4, generator=generator)
        choice = [0, (step % 2)]  # rank 1 alternates; expert 2 is never used
        engine.backward(engine(data[dist.get_rank()], choice[dist.get_rank()]))
        engine.step()
        (sum(plain(data[rank], choice[rank]) for rank in range(2)) / 2).backward()
        reference.step()
        reference.zero_grad()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6, msg=name)


@pytest.mark.parametrize("stage", STAGES)
def test_an_edited_gradient_counts(stage):
    run_on_ranks(2, edited, stage)


def edited(stage):
    config = config_for(stage, "fp32", 1, 0.0)
    config["optimizer"] = {"type": "SGD", "params": {"lr": 1.0}}
    engine, *_ = deepspeed.initialize(model=make_toy(), config=config)
    weight = engine.module.blocks[0][1].weight
    before = weight.detach().clone()
    engine.backward(toy_loss(engine, toy_batch(0, 0, dist.get_rank())))
    grad = safe_get_full_grad(weight)
    if stage == 0:
        weight.grad.mul_(2)
    else:
        safe_set_full_grad(weight, 2 * grad)
    engine.step()
    torch.testing.assert_close(weight.detach(), before - 2 * grad)


@on_ranks(2)
def test_grads_are_visible_where_this_rank_holds_them_all():
    engine, *_ = deepspeed.initialize(model=make_toy(), config=config_for(0, "fp32", 1, 0.0))
    engine.backward(toy_loss(engine, toy_batch(0, 0, dist.get_rank())))
    for param in engine.module.parameters():
        if param.numel():
            torch.testing.assert_close(param.grad / 2, safe_get_full_grad(param))
    engine.step()
    assert all(param.grad is None for param in engine.module.parameters())


def test_512_tiny_gradients_survive_bf16_accumulation():
    run_on_ranks(1, tiny_gradients)


def tiny_gradients():
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 512,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "SGD", "params": {"lr": 1.0}},
    }
    engine, *_ = deepspeed.initialize(model=model, config=config)
    for _ in range(512):
        engine.backward(engine(torch.ones(1, 1)).sum(), scale_wrt_gas=False)
        engine.step()
    assert engine.optimizer.units[0].master[0].item() == 1 - 512


@on_ranks(1)
def test_fp16_refuses_a_loss_nobody_scaled_and_takes_a_scaled_one():
    engine, *_ = deepspeed.initialize(model=make_toy(), config=config_for(2, "fp16", 1, 0.0))
    with pytest.raises(UsageError, match=r"engine\.scale"):
        toy_loss(engine, toy_batch(0, 0, 0)).backward()
    engine.scale(toy_loss(engine, toy_batch(0, 0, 0))).backward()
    engine.step()
    assert engine.was_step_applied()


@on_ranks(2)
def test_two_engines_share_one_loss():
    first, *_ = deepspeed.initialize(model=nn.Linear(3, 4), config=config_for(2, "fp32", 1, 0.0))
    second, *_ = deepspeed.initialize(model=nn.Linear(4, 1), config=config_for(1, "fp32", 1, 0.0))
    chain = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    chain[0].load_state_dict(first.module.state_dict())
    chain[1].load_state_dict(second.module.state_dict())
    reference = torch.optim.AdamW(chain.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(3):
        data = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(step))
        second(first(data[dist.get_rank()])).square().mean().backward()
        first.step()
        second.step()
        chain(data.reshape(10, 3)).square().mean().backward()
        reference.step()
        reference.zero_grad()
    for ours, theirs in zip(
        [*first.module.parameters(), *second.module.parameters()], chain.parameters(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6)


@on_ranks(2)
def test_gradients_with_a_graph_of_their_own_are_accumulated_without_it():
    config = config_for(1, "bf16", 3, 0.0)
    engine, *_ = deepspeed.initialize(model=nn.Linear(4, 4), config=config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of create_graph
        for _ in range(6):
            engine(torch.ones(2, 4).bfloat16()).float().square().mean().backward(create_graph=True)
            engine.step()
            local = [one._local for one in engine._reducer.gradients if one._local is not None]
            assert not any(one.requires_grad for one in local)
    assert engine.global_steps == 2


class ManyTiny(nn.Module):
    """Parameters of a few elements each, which are laid out before they are sent."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ParameterList(torch.linspace(-1, 1, 7) * (index + 1) for index in range(60))

    def forward(self, x):
        return sum(((part * x) ** 2).mean() for part in self.parts)


@pytest.mark.parametrize("stage", STAGES)
@on_ranks(2)
def test_many_tiny_parameters_train_as_in_plain_torch(stage):
    model, twin = ManyTiny(), ManyTiny()
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": stage},
        },
    )
    batches = [torch.linspace(0.1, 1, 7) * (rank + 1) for rank in range(2)]
    plain = torch.optim.SGD(twin.parameters(), lr=0.1)
    for _ in range(3):
        engine.backward(engine(batches[dist.get_rank()]))
        engine.step()
        plain.zero_grad()
        (sum(twin(batch) for batch in batches) / 2).backward()
        plain.step()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("switch", ["1", "0"])
@on_ranks(2)
def test_stage_1_reduces_in_every_backward_where_ranks_share_memory(monkeypatch, switch):
    monkeypatch.setenv(SWITCH, switch)
    group, rank = dist.new_group(), dist.get_rank()
    mpu = SimpleNamespace(get_data_parallel_group=lambda: group)
    config = config_for(1, "fp32", 2, 0.0)
    engine, *_ = deepspeed.initialize(model=make_toy(), config=config, mpu=mpu)
    engine.backward(toy_loss(engine, toy_batch(0, 0, rank)))
    gradients = engine._reducer.gradients
    assert all(one.holds_local == (switch == "0") for one in gradients)
    assert all(one.landed.is_empty == (switch == "0") for one in gradients)
    engine.destroy()
