"""Models that are born sharded train like any other, whatever built them and at whatever stage they train."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from collectives import gathers_are_collectives
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from harness import run_on_ranks
from reference import PlainTrainer
from torch import nn
from toys import Toy, make_toy, toy_batch, toy_loss
from training import assert_equal_training, config_for, drive_engine

import deepspeed
from deepspeed.comm import comms_logger
from deepspeed.errors import ConfigError, NotBuiltError
from deepspeed.zero import GatheredParameters


def trained_like_plain(stage):
    config = config_for(stage, "fp32", 1, 0.5)
    torch.manual_seed(dist.get_rank())  # the first rank's values count
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = Toy(tied=True, frozen=True)
    whole = copy.deepcopy(whole_copy(model))
    ranks, rank = dist.get_world_size(), dist.get_rank()
    plain = PlainTrainer(
        whole,
        lambda params: torch.optim.AdamW(params, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1),
        storage=torch.float32,
        clip=0.5,
    )
    engine = deepspeed.initialize(model=model, config=config)[0]
    for step in range(3):
        plain.step([toy_batch(step, 0, r) for r in range(ranks)], toy_loss, gas=1)
        drive_engine(engine, [toy_batch(step, 0, rank)])
    assert_equal_training(engine, plain, 2e-6)
    engine.destroy()


def whole_copy(model):
    with GatheredParameters(model.parameters()):
        return copy.deepcopy(model)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_model_born_sharded_trains_like_plain_pytorch(ranks, stage):
    run_on_ranks(ranks, trained_like_plain, stage)


class Parent(nn.Module):
    def __init__(self):
        super().__init__()
        self.child = nn.Linear(4, 4)
        nn.init.constant_(self.child.weight, 0.5)
        with torch.no_grad():
            self.child.bias.fill_(dist.get_rank() + 1.0)
        self.apply(self.scale)

    @staticmethod
    def scale(module):
        if isinstance(module, nn.Linear):
            module.weight.data.mul_(2)


def sees_whole_tensors():
    before = nn.Linear.__init__, torch.empty, nn.Module.__dict__.get("__init_subclass__")
    with deepspeed.zero.Init():
        with deepspeed.zero.Init():
            parent = Parent()

        class Late(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(torch.full((3,), 2.0))

        late = Late()
        stack = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False)
    assert (nn.Linear.__init__, torch.empty, nn.Module.__dict__.get("__init_subclass__")) == before
    for param in (*parent.parameters(), *late.parameters(), *stack.parameters()):
        assert param.ds_status is ZeroParamStatus.NOT_AVAILABLE
        assert param.ds_numel == param.numel() == param.ds_shape.numel()
    with GatheredParameters([*parent.parameters(), late.weight]):
        assert parent.child.weight.unique().tolist() == [1.0]
        assert parent.child.bias.unique().tolist() == [1.0]
        assert late.weight.tolist() == [2.0, 2.0, 2.0]


def test_initialisers_see_whole_tensors_and_the_first_rank_decides():
    run_on_ranks(2, sees_whole_tensors)


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        conv = nn.Conv1d(4, 4, 3, padding=1)
        with GatheredParameters(conv.weight, modifier_rank=0):
            self.conv = nn.utils.parametrizations.weight_norm(conv, name="weight", dim=2)
        for param in (
            self.conv.parametrizations.weight.original0,
            self.conv.parametrizations.weight.original1,
        ):
            deepspeed.zero.register_external_parameter(self, param)

    def forward(self, inputs):
        return self.conv(inputs)


def weight_norm_of_what_is_gathered():
    config = config_for(3, "fp32", 1, 0.5)
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = Normed()
    plain = whole_copy(model)
    engine = deepspeed.initialize(model=model, config=config)[0]
    inputs = torch.linspace(-1, 1, 40).view(2, 4, 5)
    torch.testing.assert_close(engine(inputs), plain(inputs))
    loss = engine(inputs).square().mean()
    engine.backward(loss)
    engine.step()
    assert engine(inputs).square().mean() < loss


def test_weight_norm_is_registered_on_gathered_parameters():
    run_on_ranks(2, weight_norm_of_what_is_gathered)


def takes_dtype_and_module():
    with deepspeed.zero.Init(dtype=torch.float16):
        assert nn.Linear(2, 2).weight.dtype is torch.float16
    with deepspeed.zero.Init(config={"bf16": {"enabled": True}}):
        assert nn.Linear(2, 2).weight.dtype is torch.bfloat16
    with deepspeed.zero.Init(enabled=False):
        assert not hasattr(nn.Linear(2, 2).weight, "ds_id")
    toy = make_toy()
    deepspeed.zero.Init(module=toy)
    assert all(param.ds_status is ZeroParamStatus.NOT_AVAILABLE for param in toy.parameters())
    for wrong in ({"config_dict_or_path": "/missing.json"}, {"config": {"bf17": {}}}):
        with pytest.raises(ConfigError):
            deepspeed.zero.Init(**wrong)
    with pytest.raises(ConfigError, match="pass one"):
        deepspeed.zero.Init(
            data_parallel_group=dist.group.WORLD, sequence_data_parallel_group=dist.group.WORLD
        )
    for wrong, message in (
        ({"remote_device": "nvme"}, "nvme_path"),
        ({"remote_device": "meta"}, "remote_device"),
        ({"param_swapper": object()}, "param_swapper"),
    ):
        with pytest.raises(ConfigError, match=message):
            deepspeed.zero.Init(**wrong)
    with pytest.raises(NotBuiltError, match="quantised"):
        deepspeed.zero.Init(zero_quantized_weights=True)


def test_arguments_of_init():
    run_on_ranks(2, takes_dtype_and_module)


def transformers_model(kind):
    transformers = pytest.importorskip("transformers")
    config = {
        "gpt2": lambda: transformers.GPT2Config(
            n_layer=2, n_head=2, n_embd=16, vocab_size=31, n_positions=16
        ),
        "llama": lambda: transformers.LlamaConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=31,
            tie_word_embeddings=True,
        ),
    }[kind]()
    settings = config_for(3, "bf16", 1, 0.5)
    with deepspeed.zero.Init(config_dict_or_path=settings):
        model = transformers.AutoModelForCausalLM.from_config(config)
    model.config.pad_token_id = 0
    with GatheredParameters(model.get_input_embeddings().weight, modifier_rank=0):
        model.resize_token_embeddings(37, mean_resizing=False)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    engine = deepspeed.initialize(model=model, config=settings)[0]
    tokens = torch.arange(12).view(2, 6) + dist.get_rank()
    losses = []
    for _ in range(5):
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    engine.eval()
    with deepspeed.zero.unwrap_model_for_generation(engine) as module:
        whole = module.generate(tokens, max_new_tokens=3, do_sample=False)
    assert torch.equal(
        whole, engine.module.generate(tokens, max_new_tokens=3, do_sample=False, synced_gpus=True)
    )


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_transformers_model_is_built_resized_trained_and_asked(kind):
    run_on_ranks(2, transformers_model, kind)


def laid_out_with_one_gather_for_each():
    config = config_for(3, "fp32", 1, 0.0)
    with gathers_are_collectives():
        with deepspeed.zero.Init(config_dict_or_path=config):
            model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40))
        before = whole_copy(model)
        comms_logger.configure(enabled=True)
        engine = deepspeed.initialize(model=model, config=config)[0]
        calls: Counter[str] = Counter()
        for (op, _), tally in comms_logger.tallies.items():
            calls[op] += tally.count
        comms_logger.configure(enabled=False)
        comms_logger.reset()
        assert calls == {"all_gather_single": 4}
        for old, new in zip(before.parameters(), whole_copy(model).parameters(), strict=True):
            assert torch.equal(old, new)
        engine.destroy()


@pytest.mark.parametrize("ranks", [2, 3])
def test_an_engine_reads_what_was_born_sharded_with_one_gather_for_each_parameter(ranks):
    run_on_ranks(ranks, laid_out_with_one_gather_for_each)
