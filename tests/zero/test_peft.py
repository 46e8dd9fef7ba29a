"""peft's adapters train as in plain PyTorch at every stage, cost nothing for what is frozen, and are saved complete."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import peft
import pytest
import torch
import torch.distributed as dist
import transformers
from harness import run_on_ranks
from safetensors.torch import load_file
from twins import Twins, refused, seeded

import deepspeed
from deepspeed.zero import GatheredParameters
from deepspeed.zero.slot import trained_slot

VOCABULARY = 37


def base_model(architecture="llama"):
    common = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": None, "initializer_range": 0.3}
    if architecture == "gpt2":
        config = transformers.GPT2Config(
            n_layer=2,
            n_head=2,
            n_embd=16,
            n_positions=16,
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
            **common,
        )
    else:
        config = transformers.LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            **common,
        )
    return transformers.AutoModelForCausalLM.from_config(config)


LAYERS = {"llama": ["q_proj", "v_proj", "up_proj"], "gpt2": ["c_attn", "c_fc"]}


def adapter(kind, architecture="llama"):
    """Return the configuration of an adapter whose gradients are not zero at first."""
    lora = {
        "target_modules": LAYERS[architecture],
        "fan_in_fan_out": architecture == "gpt2",
        "r": 3,
        "lora_alpha": 6,
        "init_lora_weights": False,
    }
    return {
        "lora": lambda: peft.LoraConfig(task_type="CAUSAL_LM", **lora),
        "dora": lambda: peft.LoraConfig(task_type="CAUSAL_LM", use_dora=True, **lora),
        "saved": lambda: peft.LoraConfig(task_type="CAUSAL_LM", modules_to_save=["lm_head"], **lora),
        "embedding": lambda: peft.LoraConfig(
            task_type="CAUSAL_LM", **{**lora, "target_modules": ["embed_tokens", "q_proj"]}
        ),
        "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "ia3": lambda: peft.IA3Config(
            task_type="CAUSAL_LM",
            target_modules=["k_proj", "v_proj", "down_proj"],
            feedforward_modules=["down_proj"],
        ),
    }[kind]()


def peft_model(kind, architecture="llama"):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base_model(architecture), adapter(kind, architecture))
    model.config.loss_type = "ForCausalLM"
    return model.train()


def loss_of(model, rank):
    tokens = torch.arange(12).view(2, 6) * (rank + 3) % VOCABULARY
    return model(input_ids=tokens, labels=tokens).loss


def trains_like_plain(kind, architecture, stage):
    twins = Twins(seeded(1, lambda: peft_model(kind, architecture)), stage=stage, lr=0.05)
    for _ in range(3):
        twins.step(loss_of)
    only_the_adapter_is_trained(twins)
    twins.finish(tolerance=1e-5)


def only_the_adapter_is_trained(twins):
    """Nothing but the adapter has gradients, masters or moments."""
    optimizer = twins.engine.optimizer
    params = dict(twins.engine.module.named_parameters())
    trained = {name for name, param in params.items() if param.requires_grad}
    assert {name for unit in optimizer.units for name in unit.names} == trained
    assert {name for name, param in params.items() if trained_slot(param) is not None} == trained
    report = twins.engine.memory_report()
    assert report.masters == 0  # fp32 weights are their own
    assert 0 < report.optimizer <= sum(4 * unit.layout.chunk for unit in optimizer.units)


CASES = [
    ("lora", "llama"),
    ("lora", "gpt2"),
    ("dora", "llama"),
    ("saved", "llama"),
    ("embedding", "llama"),
    ("prompt", "llama"),
    ("prefix", "llama"),
    ("ia3", "llama"),
]


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize(("kind", "architecture"), CASES)
def test_an_adapter_trains_like_plain_pytorch(kind, architecture, stage):
    run_on_ranks(2, trains_like_plain, kind, architecture, stage)


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (1, 1), (1, 2), (1, 3), (2, 1), (2, 2)])
def test_lora_and_saved_modules_at_the_other_stages_and_on_one_rank(ranks, stage):
    run_on_ranks(ranks, trains_like_plain, "saved", "llama", stage)


def recomputes(reentrant):
    def build():
        model = peft_model("saved")
        model.enable_input_require_grads()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the name that most scripts still use
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        return model

    twins = Twins(seeded(1, build), lr=0.05)
    for _ in range(3):
        twins.step(loss_of)
    twins.finish(tolerance=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_an_adapter_with_gradient_checkpointing(reentrant):
    run_on_ranks(2, recomputes, reentrant)


def saves_complete_adapters(kind, stage, folder):
    twins = Twins(seeded(1, lambda: peft_model(kind)), stage=stage, lr=0.05)
    twins.step(loss_of)
    engine, module = twins.engine, twins.engine.module
    trained = [param for param in module.parameters() if param.requires_grad]
    expected = peft.get_peft_model_state_dict(twins.plain)
    rank = dist.get_rank()

    def compare(state):
        assert set(state) == set(expected)
        for name, value in expected.items():
            torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-6)

    if stage == 3 and dist.get_world_size() > 1:  # without the values nothing is written
        refused(lambda: module.save_pretrained(f"{folder}/bare{rank}"), "lora_", "GatheredParameters")
        assert not list(Path(f"{folder}/bare{rank}").glob("*.safetensors"))
    with GatheredParameters(trained):
        compare(peft.get_peft_model_state_dict(module))
        if rank == 0:
            module.save_pretrained(f"{folder}/gathered")
    weights = engine.module_state_dict(exclude_frozen_parameters=True)  # what transformers' Trainer passes
    if rank == 0:
        module.save_pretrained(f"{folder}/passed", state_dict=weights)
        for way in ("gathered", "passed"):
            compare(load_file(f"{folder}/{way}/adapter_model.safetensors"))
            assert json.loads(Path(f"{folder}/{way}/adapter_config.json").read_text())["r"] == 3
    dist.barrier()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = peft.PeftModel.from_pretrained(seeded(1, base_model), f"{folder}/gathered")
    torch.testing.assert_close(logits(loaded.eval()), logits(twins.plain.eval()))
    engine.destroy()


def logits(model):
    return model(input_ids=torch.arange(6).view(1, 6)).logits


@pytest.mark.parametrize("kind", ["lora", "saved"])
@pytest.mark.parametrize(("ranks", "stage"), [(1, 3), (2, 0), (2, 2), (2, 3)])
def test_a_saved_adapter_is_complete(kind, ranks, stage, tmp_path):
    run_on_ranks(ranks, saves_complete_adapters, kind, stage, str(tmp_path))


def switches_and_merges(stage):
    def build():
        model = peft_model("saved")
        model.add_adapter("other", adapter("lora"))
        return model

    twins = Twins(seeded(1, build), stage=stage, lr=0.05)
    module = twins.engine.module
    for name in ("other", "default"):
        twins.step(loss_of)
        module.base_model.set_adapter(name, inference_mode=True)  # leaves requires_grad as it was
        twins.plain.base_model.set_adapter(name, inference_mode=True)
        with torch.no_grad():
            torch.testing.assert_close(logits(module), logits(twins.plain), rtol=1e-4, atol=1e-5)
        for one in (module, twins.plain):
            one.base_model.set_adapter("default")
    with module.disable_adapter(), twins.plain.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(logits(module), logits(twins.plain))
    if stage == 3:
        refused(module.merge_adapter, "lora_", "GatheredParameters")
        refused(lambda: copy.deepcopy(module).merge_and_unload(), "GatheredParameters")
    with GatheredParameters(module.parameters()):
        merged = copy.deepcopy(module).merge_and_unload()
    assert not any(hasattr(param, "ds_id") for param in merged.parameters())
    expected = copy.deepcopy(twins.plain).merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(expected), rtol=1e-4, atol=1e-5)
    for one in (module, twins.plain):  # in place and back
        with GatheredParameters(one.parameters()):
            one.merge_adapter()
            one.unmerge_adapter()
    twins.step(loss_of)
    twins.finish(tolerance=1e-4)


@pytest.mark.parametrize("stage", [0, 3])
def test_adapters_are_switched_disabled_and_merged(stage):
    run_on_ranks(2, switches_and_merges, stage)


def born_sharded():
    with deepspeed.zero.Init(config_dict_or_path={"train_micro_batch_size_per_gpu": 1}):
        base = seeded(1, base_model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base, adapter("lora"))
    base.loss_type = "ForCausalLM"
    assert {hasattr(param, "ds_id") for param in model.parameters()} == {True, False}
    for param in model.parameters():
        if not hasattr(param, "ds_id"):
            dist.broadcast(param.detach(), 0)
    twins = Twins(model)
    twins.step(loss_of)
    twins.step(loss_of)
    twins.finish(tolerance=1e-5)


def test_an_adapter_on_a_model_born_sharded():
    run_on_ranks(2, born_sharded)
