"""What cannot be done with sharded parameters is refused by name, changes nothing, and training goes on."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from harness import run_on_ranks
from torch import nn
from twins import EVERYTHING_RELEASED, Twins, data, refused, seeded

import deepspeed
from deepspeed.errors import UsageError
from deepspeed.zero import GatheredParameters


def net():
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 9), nn.Linear(9, 6))


def loss_of(model, rank):
    return model(data(rank)).square().mean()


def in_no_grad(change):
    with torch.no_grad():
        change()


def reads_and_edits_of(module, weight, bias):
    """Return what needs values of released parameters."""
    return {
        "edit": lambda: in_no_grad(lambda: weight.add_(1)),
        "edit through data": lambda: weight.data.add_(1),
        "edit of an entry": lambda: weight.data.__setitem__(0, 1.0),
        "edit of an earlier alias": lambda data=weight.data: data.zero_(),
        "edit as an out argument": lambda: torch.add(torch.ones(9, 6), 1, out=weight.data),
        "edit of several": lambda: torch._foreach_mul_([weight.data, bias.data], 2.0),
        "initialiser": lambda: nn.init.normal_(weight),
        "other memory": lambda: setattr(weight, "data", torch.zeros(9, 6)),
        "other storage": lambda: weight.set_(torch.zeros(9, 6)),
        "empty": lambda: module.to_empty(device="cpu"),
        "share": module.share_memory,
        "another size": lambda: weight.data.resize_(3, 3),
        "norm": lambda: weight.norm(),
        "number": lambda: bias[0].item(),
        "numpy": lambda: weight.detach().numpy(),
        "list": lambda: weight.tolist(),
        "function": lambda: nn.functional.linear(torch.ones(1, 6), weight, bias),
        "product": lambda: torch.ones(1, 6) @ weight.T,
        "view": lambda: weight.view(-1),
        "copy": lambda: copy.deepcopy(module),
        "clone": lambda: weight.clone(),
        "parameter": lambda: nn.Parameter(weight),
        "other class": lambda: weight.as_subclass(torch.Tensor),
        "pickle": lambda: pickle.dumps(weight),
        "file": lambda: torch.save(module.state_dict(), "/dev/null"),
        "vector": lambda: nn.utils.parameters_to_vector(module.parameters()),
        "average": lambda: torch.optim.swa_utils.AveragedModel(module),
    }


def refusal_of(action):
    try:
        action()
    except UsageError as error:
        return str(error)
    return "done"


def refuses_and_goes_on():
    twins = Twins(seeded(1, net))
    twins.step(loss_of)
    module = twins.engine.module
    weight, bias = module[0].weight, module[0].bias
    for what, action in reads_and_edits_of(module, weight, bias).items():
        assert "GatheredParameters" in refusal_of(action), what
    with pytest.raises(RuntimeError, match="GatheredParameters"):
        module.load_state_dict(twins.plain.state_dict())
    assert (weight.shape, weight.numel(), weight.ndim, weight.dtype) == ((9, 6), 54, 2, torch.float32)
    assert repr(weight) == "Parameter 0.weight of shape (9, 6), released"
    assert torch.zeros_like(weight).shape == weight.shape
    assert {weight: 1}[weight] == 1
    assert len(list(module.parameters())) == 6
    for model in (module, twins.plain):  # inside, all of it works
        with GatheredParameters(model.parameters(), modifier_rank=0), torch.no_grad():
            model[0].weight.add_(1)
            model.load_state_dict({name: value * 2 for name, value in model.state_dict().items()})
    twins.step(loss_of)
    twins.finish()


def test_reads_and_edits_of_what_is_released():
    run_on_ranks(2, refuses_and_goes_on)


def moves(stage):
    twins = Twins(seeded(2, net), stage=stage)
    twins.step(loss_of)
    module = twins.engine.module
    for unchanged in (lambda: module.to("cpu"), module.float, lambda: twins.engine.to(torch.float32)):
        unchanged()
        twins.step(loss_of)
    for change in (module.half, module.double, lambda: module.to("meta"), twins.engine.bfloat16):
        if stage == 3:
            refused(change, "0.weight", "before initialize")
    if stage < 3:  # torch replaces the memory of whole parameters, which is seen at the step
        twins.backward_everywhere(loss_of)
        module.double()
        refused(twins.engine.step, "0.weight", "before initialize")
    else:
        twins.step(loss_of)
        twins.finish()


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_moves_and_casts_after_initialize(stage):
    run_on_ranks(2, moves, stage)


def optimizers_on_released_parameters(make):
    plain = seeded(3, net)
    expected = make(plain.parameters())
    model = seeded(3, net)
    deepspeed.zero.Init(module=model)
    engine = deepspeed.initialize(
        model=model,
        optimizer=make(model.parameters()),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": 3, **EVERYTHING_RELEASED},
        },
    )[0]
    for _ in range(2):
        engine.backward(loss_of(engine, dist.get_rank()))
        engine.step()
        for rank in range(dist.get_world_size()):
            (loss_of(plain, rank) / dist.get_world_size()).backward()
        expected.step()
        expected.zero_grad()
    for name, value in engine.module_state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name], rtol=1e-5, atol=1e-6)
    engine.destroy()


def adam(params):
    return torch.optim.AdamW(params, lr=0.01)


def adagrad(params):
    return torch.optim.Adagrad(params, lr=0.01, initial_accumulator_value=0.5)


def foreach_sgd(params):
    return torch.optim.SGD(params, lr=0.01, momentum=0.9, weight_decay=0.1, foreach=True)


@pytest.mark.parametrize("make", [adam, adagrad, foreach_sgd])
def test_an_optimizer_built_on_released_parameters_trains(make):
    run_on_ranks(2, optimizers_on_released_parameters, make)


def another_number_of_ranks(first_alone):
    """Build over one set of ranks and train over another: the first rank's values are everybody's."""
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    groups = [alone, None] if first_alone else [None, alone]

    class Unit:  # a model-parallel unit whose data-parallel ranks are those of the second set
        def __getattr__(self, name):
            if name == "get_data_parallel_group":
                return lambda: groups[1]
            if name == "get_model_parallel_group":
                return lambda: dist.group.WORLD
            if name.endswith("_world_size"):
                return lambda: 1 if "data" in name else dist.get_world_size()
            if name.endswith("_rank"):
                return lambda: 0 if "data" in name else dist.get_rank()
            raise AttributeError(name)

    with deepspeed.zero.Init(data_parallel_group=groups[0]):
        model = seeded(4 + dist.get_rank(), net)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, **EVERYTHING_RELEASED},
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    }
    engine = deepspeed.initialize(model=model, config=config, mpu=None if first_alone else Unit())[0]
    plain = seeded(4, net)
    for name, value in engine.module_state_dict().items():
        assert torch.equal(value, plain.state_dict()[name]), name
    engine.backward(loss_of(engine, 0))
    engine.step()
    engine.destroy()


@pytest.mark.parametrize("first_alone", [True, False])
def test_a_model_born_on_other_ranks_than_it_trains_on(first_alone):
    run_on_ranks(2, another_number_of_ranks, first_alone)
