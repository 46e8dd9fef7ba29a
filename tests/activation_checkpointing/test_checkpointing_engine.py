"""Checkpoints in a model that an engine trains: nothing changes but memory."""

import warnings
from functools import partial

import pytest
import torch
import torch.distributed as dist
from harness import run_on_ranks
from layers import LAYERS, Stack, assert_same, batch, unconfigured
from test_stores import Unit
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import deepspeed
from deepspeed.activation_checkpointing import checkpointing
from deepspeed.activation_checkpointing.stores import Partition
from deepspeed.zero.access import safe_get_full_fp32_param, safe_get_full_grad

WAYS = {
    "plain": {},
    "host": {"cpu_checkpointing": True},
    "contiguous": {"contiguous_memory_optimization": True, "number_checkpoints": LAYERS},
    "all": {
        "partition_activations": True,
        "cpu_checkpointing": True,
        "contiguous_memory_optimization": True,
        "number_checkpoints": LAYERS,
        "synchronize_checkpoint_boundary": True,
    },
}


def trained(stage, run, mpu=None, *, frozen=False, twice=False, forwards=1, backwards=1):
    """Train three steps; return every loss and gradient, and the last weights.

    `twice`: one layer stands at two places. `forwards`: losses in a backward. `backwards`: of them, in a step.
    """
    config = {
        "train_micro_batch_size_per_gpu": 5,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
    }
    model = Stack(run)
    if twice:
        model.layers[2] = model.layers[0]
    if frozen:
        model.layers[1].requires_grad_(False)
        model.layers[2].body[0].requires_grad_(False)
    engine, *_ = deepspeed.initialize(model=model, config=config, mpu=mpu)
    found = []
    for step in range(3):
        place = dist.get_rank(mpu.get_data_parallel_group() if mpu else None)
        torch.manual_seed(10 * step + place)
        for micro in range(backwards):
            loss = sum(engine(batch(step, 10 * micro + 2 * part + place)) for part in range(forwards))
            engine.backward(loss)
            found.append(loss.detach())
        found += [safe_get_full_grad(param) for param in model.parameters() if param.requires_grad]
        engine.step()
    found += [safe_get_full_fp32_param(param) for param in model.parameters() if param.requires_grad]
    engine.destroy()
    return found


def same_training(stage, way, frozen):
    with unconfigured():
        section = deepspeed.config.load_config(
            {"train_batch_size": 2, "activation_checkpointing": WAYS[way]}, world_size=2
        ).activation_checkpointing
        checkpointing.configure_from(section)
        expected = trained(stage, None, frozen=frozen)
        assert_same(trained(stage, checkpointing.checkpoint, frozen=frozen), expected)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_training_is_the_same_to_the_bit(stage, way, frozen):
    run_on_ranks(2, same_training, stage, way, frozen)


RUNS = {
    "ours": checkpointing.checkpoint,
    "reentrant": partial(torch_checkpoint, use_reentrant=True),
    "non-reentrant": partial(torch_checkpoint, use_reentrant=False),
}


def same_pattern(stage, run, **pattern):
    with unconfigured():
        assert_same(trained(stage, RUNS[run], **pattern), trained(stage, None, **pattern))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("shape", [{"frozen": True}, {"twice": True}], ids=lambda shape: "+".join(shape))
@pytest.mark.parametrize(("forwards", "backwards"), [(2, 1), (1, 2), (2, 2)])
def test_several_forwards_and_backwards_in_a_step(stage, run, shape, forwards, backwards):
    run_on_ranks(2, same_pattern, stage, run, **shape, forwards=forwards, backwards=backwards)


def partitioned_training(stage):
    with unconfigured():
        unit = Unit(pairs=True)
        checkpointing.configure(unit, partition_activations=True)
        assert isinstance(checkpointing._settings.stores[0], Partition)
        assert_same(trained(stage, checkpointing.checkpoint, unit), trained(stage, None, unit))


@pytest.mark.parametrize("stage", [0, 3])
def test_inputs_partitioned_over_two_ranks_and_weights_over_two_others(stage):
    run_on_ranks(4, partitioned_training, stage)


class Borrowed(torch.nn.Module):
    """A head that computes with a weight given to it, another module's."""

    def __init__(self, run):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.second = torch.nn.Linear(6, 4), torch.nn.Linear(6, 4)
        self.run = run or (lambda function, *args: function(*args))

    def forward(self, inputs):
        hidden = self.run(torch.nn.functional.linear, self.first(inputs).sin(), self.second.weight.t())
        return (
            self.run(torch.nn.functional.linear, hidden, self.second.weight, self.second.bias).square().mean()
        )


def same_with_borrowed_weights(stage, way):
    with unconfigured():
        checkpointing.configure(None, {"activation_checkpointing": WAYS[way]})
        results = []
        for run in (None, checkpointing.checkpoint):
            config = {
                "train_micro_batch_size_per_gpu": 5,
                "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
                "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
            }
            engine, *_ = deepspeed.initialize(model=Borrowed(run), config=config)
            for step in range(3):
                engine.backward(engine(batch(step, dist.get_rank())))
                engine.step()
            results.append([safe_get_full_fp32_param(param) for param in engine.module.parameters()])
            engine.destroy()
        assert_same(*results)


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("way", ["plain", "contiguous", "all"])
def test_weights_may_be_arguments(stage, way):
    run_on_ranks(2, same_with_borrowed_weights, stage, way)


def trained_transformer(stage, kwargs):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=17,
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            attention_dropout=0.2,
            use_cache=False,
        )
    )
    if kwargs is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # it has a new name since transformers 5
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
        if kwargs["use_reentrant"]:
            model.enable_input_require_grads()
    engine, *_ = deepspeed.initialize(
        model=model,
        config={
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
        },
    )
    losses = []
    for step in range(3):
        torch.manual_seed(10 * step + dist.get_rank())
        tokens = torch.randint(0, 17, (2, 5))
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach())
    losses += [safe_get_full_fp32_param(param) for param in model.parameters()]
    engine.destroy()
    return losses


def same_transformer(stage, kwargs):
    assert_same(trained_transformer(stage, kwargs), trained_transformer(stage, None))


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("reentrant", [False, True])
def test_the_switch_of_transformers(stage, reentrant):
    pytest.importorskip("transformers")
    run_on_ranks(2, same_transformer, stage, {"use_reentrant": reentrant})
