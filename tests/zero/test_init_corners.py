"""Whatever happens inside zero.Init, initialisers write to what is kept and nothing of torch stays changed."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from harness import run_on_ranks
from torch import nn
from torch.utils import _device

import deepspeed
from deepspeed.errors import ConfigError, UsageError
from deepspeed.zero import GatheredParameters


def values_of(model):
    with GatheredParameters(model.parameters()):
        return {name: param.detach().clone() for name, param in model.named_parameters()}


def what_is_patched():
    return (
        torch.empty,
        torch.tensor,
        torch.arange,
        nn.Linear.__init__,
        nn.Module.__dict__.get("__init_subclass__"),
    )


class Initialised(nn.Module):
    """Initialises its layers from one another, through views that are written to later."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(6, 6) for _ in range(3))
        nn.init.orthogonal_(self.first.weight)
        nn.init.zeros_(self.second.weight)
        row, column = self.second.weight[0], self.second.weight.t()[5]
        with torch.no_grad():
            nn.init.xavier_uniform_(self.third.weight)
            row.fill_(1)
            column.fill_(2)
            self.second.bias.copy_(self.first.weight.sum(1))
            for part in self.third.weight.chunk(3):
                part.copy_(torch.arange(12.0).view(2, 6))
        self.product = nn.Parameter(self.first.weight.detach() * 3)
        self.register_buffer("norm", self.first.weight.detach().norm())


def views_are_written_to():
    torch.manual_seed(dist.get_rank())
    with deepspeed.zero.Init():
        model = Initialised()
        outside = nn.Linear(5, 5)
        nn.init.orthogonal_(outside.weight)
        nn.init.eye_(outside.weight[:2, :2])
    values = values_of(model)
    first, second = values["first.weight"], values["second.weight"]
    torch.testing.assert_close(first @ first.t(), torch.eye(6), atol=1e-5, rtol=0)
    assert second[0].tolist() == [1, 1, 1, 1, 1, 2]
    assert second[:, 5].unique().tolist() == [2]
    assert second[1:, :5].unique().tolist() == [0]
    assert torch.equal(values["second.bias"], first.sum(1))
    assert torch.equal(values["third.weight"], torch.arange(12.0).view(2, 6).repeat(3, 1))
    assert torch.equal(values["product"], first * 3)
    assert torch.equal(model.norm, first.norm())
    assert values_of(outside)["weight"][:2, :2].tolist() == [[1, 0], [0, 1]]
    seen = [None] * dist.get_world_size()
    dist.all_gather_object(seen, {name: value.tolist() for name, value in values.items()})
    assert seen[0] == seen[-1]
    for param in (*model.parameters(), *outside.parameters()):
        assert param.ds_slot.unit.users == 0
        assert not param.ds_slot.unit.is_whole


def test_initialisers_that_write_to_views():
    run_on_ranks(2, views_are_written_to)


def device_contexts_work_afterwards():
    _device._device_constructors.cache_clear()  # as in a process that has used none yet
    with deepspeed.zero.Init(), torch.device("meta"):
        nn.Linear(3, 3)
    with torch.device("meta"):
        assert torch.empty(1).is_meta
        assert torch.arange(2).is_meta


def test_a_device_context_first_used_inside():
    run_on_ranks(1, device_contexts_work_afterwards)


def what_changes_nothing_needs_no_values():
    with deepspeed.zero.Init():
        layer = nn.Linear(4, 4)
    before = values_of(layer)
    layer.bias.data = nn.functional.pad(layer.bias.data, (0, 0), "constant", 0)
    layer.weight.data = layer.weight.data
    if dist.get_world_size() > 1:  # one rank has everything
        for changed in (lambda: nn.functional.pad(layer.bias.data, (0, 1)), lambda: layer.bias.data + 1):
            with pytest.raises(UsageError, match="expected whole for"):
                changed()
    assert all(torch.equal(value, before[name]) for name, value in values_of(layer).items())


@pytest.mark.parametrize("ranks", [1, 2])
def test_values_set_as_they_are(ranks):
    run_on_ranks(ranks, what_changes_nothing_needs_no_values)


class Broken(nn.Module):
    def __init__(self, *, view=False):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        if view:
            self.layer.weight[0].fill_(1)  # of a leaf that requires grad: torch's own error
        raise ValueError("broken")


def exceptions_leave_nothing():
    before = what_is_patched()
    for context in (
        deepspeed.zero.Init(),
        deepspeed.OnDevice(dtype=torch.float16, device="meta"),
        deepspeed.OnDevice(dtype=torch.float16, device="cpu"),
    ):
        with pytest.raises(ValueError, match="broken"), context:
            Broken()
        assert what_is_patched() == before
    with pytest.raises(RuntimeError, match="in-place"), deepspeed.zero.Init():
        Broken(view=True)
    assert what_is_patched() == before
    with deepspeed.zero.Init():
        for view in (False, True):
            with pytest.raises((ValueError, RuntimeError)):
                Broken(view=view)
        later = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    assert all(hasattr(param, "ds_id") for param in later.parameters())
    assert what_is_patched() == before


def test_an_exception_in_a_constructor():
    run_on_ranks(2, exceptions_leave_nothing)


def contexts_in_contexts():
    before = what_is_patched()
    again = deepspeed.zero.Init()
    with deepspeed.zero.Init(dtype=torch.bfloat16):
        with deepspeed.zero.Init(enabled=False), deepspeed.zero.Init(dtype=torch.float64):
            inner = nn.Linear(3, 3)
        outer = nn.Linear(3, 3)
    with again, again:
        first = nn.Linear(3, 3)
    with again:
        second = nn.Linear(3, 3)
    assert inner.weight.dtype is outer.weight.dtype is torch.bfloat16
    assert all(hasattr(layer.weight, "ds_id") for layer in (inner, outer, first, second))
    assert what_is_patched() == before


def test_contexts_inside_contexts_and_used_again():
    run_on_ranks(2, contexts_in_contexts)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"dtype": "bf16"}, "dtype: expected a floating-point torch.dtype, got 'bf16'"),
        ({"dtype": torch.int8}, "dtype: expected a floating-point torch.dtype, got torch.int8"),
        ({"module": "model"}, "module: expected a torch.nn.Module, got str"),
        ({"mpu": 4}, "mpu: expected an object with get_data_parallel_group, got 4"),
        ({"data_parallel_group": 3}, "data_parallel_group: expected a process group, got 3"),
        ({"config_dict_or_path": "/none.json"}, "there is no such file"),
    ],
)
def test_a_wrong_argument_is_named(arguments, words):
    run_on_ranks(1, names_the_argument, arguments, words)


def names_the_argument(arguments, words):
    with pytest.raises(ConfigError) as caught:
        deepspeed.zero.Init(**arguments)
    assert words in str(caught.value)


def loads_pretrained(folder):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=31
    )
    torch.manual_seed(5)
    saved = transformers.LlamaForCausalLM(config)
    if dist.get_rank() == 0:
        saved.save_pretrained(folder)
    dist.barrier()
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    }
    known = transformers.integrations.HfDeepSpeedConfig(settings)  # transformers shards as it loads
    loaded = transformers.LlamaForCausalLM.from_pretrained(folder)
    del known
    assert all(hasattr(param, "ds_id") for param in loaded.parameters())
    with deepspeed.zero.Init(config_dict_or_path=settings):
        other = transformers.LlamaForCausalLM.from_pretrained(folder)
    for model in (loaded, other):
        engine = deepspeed.initialize(model=model, config=settings)[0]
        for name, value in engine.module_state_dict().items():
            assert torch.equal(value, saved.state_dict()[name]), name
        engine.destroy()


def test_a_pretrained_model_is_loaded_whole_and_exact(tmp_path):
    run_on_ranks(2, loads_pretrained, str(tmp_path))
