"""GatheredParameters shows and keeps what users do to parameters, and accessors reach single ones, at every stage."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from collectives import gathers_are_collectives
from harness import run_on_ranks
from torch import nn
from training import config_for
from twins import Twins, data, refused, seeded

import deepspeed
from deepspeed.comm import comms_logger
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_set_full_fp32_param,
    safe_set_full_grad,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
)
from deepspeed.zero import GatheredParameters


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 9)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(9, 9), nn.LayerNorm(9)) for _ in range(2))
        self.last = nn.Linear(9, 6)
        self.register_buffer("shift", torch.ones(6))

    def forward(self, hidden):
        hidden = self.first(hidden)
        for block in self.blocks:
            hidden = torch.tanh(block(hidden))
        return self.last(hidden) + self.shift


def loss_of(model, rank):
    return model(data(rank)).square().mean()


def both(twins: Twins, change) -> None:
    with torch.no_grad():
        change(twins.engine.module)
        change(twins.plain)


def forms_of_params():
    twins = Twins(seeded(1, Net))
    module = twins.engine.module
    weight = module.first.weight
    expected = dict(twins.plain.named_parameters())
    forms = [
        weight,
        [weight, weight],
        (weight, None, module.shift),
        module.parameters(),
        (param for param in [weight]),
        {weight: 1},
        {"a": weight}.values(),
        list(module.named_parameters())[:1] and [weight, nn.Parameter(torch.ones(2)), "text"],
    ]
    for form in forms:
        refused(lambda: weight.sum(), "first.weight", "GatheredParameters")
        with GatheredParameters(form):
            assert torch.equal(weight, expected["first.weight"])
        with GatheredParameters(form, enabled=False):
            refused(lambda: weight.sum(), "first.weight")
    for empty in (None, [], (), iter(()), module.shift, nn.Parameter(torch.ones(1)), [None]):
        with GatheredParameters(empty, modifier_rank=0):
            pass
    twins.step(loss_of)
    twins.finish()


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_form_of_parameters(ranks):
    run_on_ranks(ranks, forms_of_params)


def edits(stage, modifier, through_data):
    twins = Twins(seeded(2, Net), stage=stage)
    for step in range(3):
        twins.step(loss_of)

        def edit(module, at=step):
            with GatheredParameters(list(module.parameters()), modifier_rank=modifier):
                if modifier is None or dist.get_rank() == modifier or module is twins.plain or stage < 3:
                    for param in (module.first.weight, module.blocks[1][0].bias, module.last.weight):
                        (param.data if through_data else param).mul_(1.5).add_(at)

        both(twins, edit)
    twins.step(loss_of)
    twins.finish()


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize(("modifier", "through_data"), [(None, False), (None, True), (0, False), (1, True)])
def test_edits_reach_the_weights_that_are_trained(stage, modifier, through_data):
    run_on_ranks(2, edits, stage, modifier, through_data)


def swaps_through_data():
    twins = Twins(seeded(2, lambda: nn.Linear(64, 64)))

    def loss(model, rank):
        return model(data(rank, shape=(3, 64))).square().mean()

    for near, far in ((3, 4), (3, 60)):

        def edit(module, here=near, there=far):
            with GatheredParameters(module.parameters()):
                module.weight.data[0, [here, there]] = module.weight.data[0, [there, here]]

        both(twins, edit)
        twins.step(loss)
    twins.finish()


def test_values_that_only_change_places_are_kept():
    run_on_ranks(2, swaps_through_data)


def neighbours_in_a_unit(modifier, through_data):
    twins = Twins(seeded(2, Net))
    twins.step(loss_of)

    def edit(module):
        asked, neighbour = module.first.weight, module.first.bias
        with GatheredParameters(asked, modifier_rank=modifier):
            if modifier is None or dist.get_rank() == modifier or module is twins.plain:
                for param in (asked, neighbour):
                    (param.data if through_data else param).add_(3)

    both(twins, edit)
    assert torch.equal(twins.engine.module_state_dict()["first.bias"], twins.plain.first.bias)
    twins.step(loss_of)
    twins.finish()


@pytest.mark.parametrize("modifier", [None, 1])
@pytest.mark.parametrize("through_data", [False, True])
def test_what_came_along_can_be_changed_too(modifier, through_data):
    run_on_ranks(2, neighbours_in_a_unit, modifier, through_data)


def one_rank_only():
    twins = Twins(seeded(3, Net))
    module = twins.engine.module

    def change(params):
        with GatheredParameters(params):
            if dist.get_rank() == 1:
                with torch.no_grad():
                    module.first.weight.add_(1)

    refused(lambda: change(module.first.weight), "first.weight", "modifier_rank=0")
    refused(lambda: change(list(module.parameters())), "first.weight", "modifier_rank=0")
    assert twins.engine.memory_report().gathered == 0
    refused(lambda: module.first.weight.sum(), "first.weight")
    twins.step(loss_of)
    twins.finish()


def test_a_change_on_one_rank_is_refused_and_forgotten():
    run_on_ranks(2, one_rank_only)


def exception_inside():
    twins = Twins(seeded(3, Net))
    module = twins.engine.module

    def change_and_raise(params):
        with GatheredParameters(params), torch.no_grad():
            if dist.get_rank() == 1:
                params[0].add_(1)
            raise KeyError

    for params in ([module.first.weight], list(module.parameters()), [module.blocks[0][0].bias]):
        with pytest.raises(KeyError):
            change_and_raise(params)
        assert twins.engine.memory_report().gathered == 0
    twins.step(loss_of)
    twins.finish()


def test_an_exception_inside_forgets_the_changes():
    run_on_ranks(2, exception_inside)


def nested():
    twins = Twins(seeded(4, Net))
    module = twins.engine.module

    def edit(model):
        with GatheredParameters(model.first.parameters()):
            with GatheredParameters([model.first.weight, model.last.weight]):
                model.last.weight.mul_(2)
                with GatheredParameters(model.last.bias):
                    model.last.bias.add_(3)
                model.last.weight.add_(1)
            model.first.weight.mul_(3)

    both(twins, edit)
    with GatheredParameters(module.parameters()):
        copied = copy.deepcopy(module)
    for param, other in zip(copied.parameters(), twins.plain.parameters(), strict=True):
        assert type(param) is nn.Parameter
        assert torch.equal(param, other)
    copied(data(0)).sum().backward()
    twins.step(loss_of)
    twins.finish()


def test_nested_contexts_and_a_copy():
    run_on_ranks(2, nested)


def inside_forward_and_backward():
    twins = Twins(seeded(4, Net))
    module = twins.engine.module

    def peek(*_):
        with GatheredParameters(module.first.weight):
            assert module.first.weight.shape == (9, 6)
            module.first.weight.sum()

    hook = module.blocks[0].register_forward_hook(peek)
    twins.step(loss_of)
    hook.remove()
    hidden = twins.engine(data(dist.get_rank()))
    hidden.register_hook(peek)
    twins.engine.backward(hidden.square().mean())
    for rank in range(2):
        (loss_of(twins.plain, rank) / 2).backward()
    twins.engine.step()
    twins.plain_step()
    twins.finish()


def test_gathering_inside_forward_and_backward():
    run_on_ranks(2, inside_forward_and_backward)


def replaced_inside():
    twins = Twins(seeded(5, Net))
    module = twins.engine.module
    with GatheredParameters(module.first.weight):
        module.first.weight = nn.Parameter(module.first.weight.detach().clone())
    assert torch.equal(module.first.weight, twins.plain.first.weight)
    refused(lambda: (twins.engine.backward(loss_of(twins.engine, 0)), twins.engine.step()), "first.weight")
    twins.engine.destroy()


def test_a_weight_replaced_inside_is_named_at_the_step():
    run_on_ranks(2, replaced_inside)


def by_hand():
    twins = Twins(seeded(6, Net))
    module = twins.engine.module
    params = [module.first.weight, module.last.weight]
    params[0].all_gather(params)
    both(twins, lambda model: model.first.weight.add_(1))
    params[0].partition(params, has_been_updated=True)
    refused(lambda: params[1].sum(), "last.weight")
    module.last.bias.all_gather()
    assert torch.equal(module.last.bias, twins.plain.last.bias)
    module.last.bias.partition()
    assert sum(len(part) for part in gathered_sizes(params[0])) == params[0].ds_numel
    twins.step(loss_of)
    twins.finish()


def gathered_sizes(param):
    sizes = [None] * dist.get_world_size()
    dist.all_gather_object(sizes, param.ds_tensor.tolist())
    return sizes


def test_all_gather_and_partition():
    run_on_ranks(2, by_hand)


def accessors(stage, zero):
    twins = Twins(seeded(7, Net), stage=stage, **zero)
    twins.step(loss_of)
    ranks, rank = dist.get_world_size(), dist.get_rank()
    pairs = list(zip(twins.engine.module.named_parameters(), twins.plain.parameters(), strict=True))
    twins.engine.backward(loss_of(twins.engine, rank))
    for one in range(ranks):
        (loss_of(twins.plain, one) / ranks).backward()
    for (name, param), plain in pairs:
        got = safe_get_full_grad(param), safe_get_full_fp32_param(param)
        for value, expected in zip(got, (plain.grad, plain.detach()), strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6, msg=name)
        momentum = twins.sgd.state[plain]["momentum_buffer"]
        torch.testing.assert_close(
            safe_get_full_optimizer_state(param, "momentum_buffer"), momentum, rtol=1e-5, atol=1e-6
        )
        with torch.no_grad():
            safe_set_full_grad(param, plain.grad * 2)
            plain.grad.mul_(2)
            safe_set_full_fp32_param(param, plain + 0.5)
            plain.add_(0.5)
            safe_set_full_optimizer_state(param, momentum * 3, "momentum_buffer")
            momentum.mul_(3)
        piece = safe_get_local_fp32_param(param)
        value = torch.zeros(0) if piece is None else piece * 2
        safe_set_local_fp32_param(param, value)
        with torch.no_grad():
            plain.mul_(2)
        refused(lambda p=param: safe_set_full_fp32_param(p, torch.zeros(1, 1, 1)), "shape")
    twins.engine.step()
    twins.plain_step()
    twins.finish(1e-5)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_accessors(stage):
    run_on_ranks(2, accessors, stage, {})


@pytest.mark.parametrize("zero", [{"mics_shard_size": 2}, {"zero_hpz_partition_size": 2}], ids=str)
def test_accessors_in_groups_smaller_than_the_world(zero):
    run_on_ranks(4, accessors, 3, zero)


def state_before_the_first_step():
    twins = Twins(seeded(8, Net))
    param = twins.engine.module.first.weight
    assert safe_get_full_optimizer_state(param, "momentum_buffer") is None
    refused(lambda: safe_set_full_grad(param, torch.zeros(9, 6)), "no gradient")
    for one in twins.engine.module.parameters():  # ranks that hold no piece of it too
        value = torch.zeros(one.shape)
        refused(lambda p=one, v=value: safe_set_full_optimizer_state(p, v, "momentum_buffer"), "first step")
    twins.engine.destroy()


def test_what_is_not_there_yet_cannot_be_set():
    run_on_ranks(2, state_before_the_first_step)


def resized():
    twins = Twins(seeded(9, Net))
    module = twins.engine.module

    def resize(param, *shape):
        with GatheredParameters(param, modifier_rank=0):
            param.data = torch.zeros(shape)

    refused(
        lambda: resize(module.first.weight, 12, 6), "first.weight", "(12, 6)", "before deepspeed.initialize"
    )
    refused(lambda: resize(module.first.weight, 6, 9), "first.weight", "(6, 9)", "as before")
    refused(lambda: resize(module.first.bias, 3, 3), "first.bias", "(3, 3)", "as before")
    twins.step(loss_of)
    twins.finish()


def test_a_parameter_of_another_size_is_refused():
    run_on_ranks(2, resized)


def one_of_several():
    """Ask for a parameter of a unit with more; values that addition could change are among them."""
    config = config_for(3, "fp32", 1, 0.0)
    model = seeded(3, lambda: nn.Sequential(nn.ModuleDict({name: nn.Linear(40, 40) for name in "abc"})))
    weight = model[0]["b"].weight
    with torch.no_grad():
        weight[:, ::2], weight[:, 1] = -0.0, float("nan")
    expected = weight.detach().clone()
    with gathers_are_collectives():
        engine = deepspeed.initialize(model=model, config=config)[0]
    comms_logger.configure(enabled=True)
    with GatheredParameters(weight, modifier_rank=0):
        calls = {op: tally.count for (op, size), tally in comms_logger.tallies.items() if size > 4}
        assert torch.equal(weight.view(torch.int32), expected.view(torch.int32))
    comms_logger.configure(enabled=False)
    comms_logger.reset()
    assert calls == {"all_reduce": 1}
    engine.destroy()


@pytest.mark.parametrize("ranks", [2, 3])
def test_one_parameter_of_a_unit_is_read_with_one_collective_and_bit_by_bit(ranks):
    run_on_ranks(ranks, one_of_several)
