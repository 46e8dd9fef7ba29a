"""peft's adapters on models born sharded: made, trained, saved and merged as without DeepSpeed."""

from __future__ import annotations

import copy
import warnings
from functools import partial
from importlib.util import find_spec
from unittest import mock

import peft
import pytest
import torch
import torch.distributed as dist
import transformers
from accelerate.utils import DeepSpeedPlugin
from accelerating import accelerating, loader, same, tiny_llama, train
from harness import run_on_ranks
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig, unset_hf_deepspeed_config
from twins import Twins, seeded

import deepspeed
from deepspeed.zero import GatheredParameters, ZeroParamStatus

ZERO3 = partial(DeepSpeedPlugin, zero_stage=3, zero3_save_16bit_model=True, gradient_clipping=0.5)
LORA = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "up_proj"], "r": 3, "lora_alpha": 6}
ADAPTERS = {
    "lora": partial(peft.LoraConfig, **LORA),
    "saved": partial(peft.LoraConfig, **LORA, modules_to_save=["lm_head"]),
    "olora": partial(peft.LoraConfig, **LORA, init_lora_weights="olora"),
    "pissa": partial(peft.LoraConfig, **LORA, init_lora_weights="pissa"),
    "dora": partial(peft.LoraConfig, **LORA, use_dora=True),
    "prompt": partial(peft.PromptTuningConfig, task_type="CAUSAL_LM", num_virtual_tokens=3),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The folder of a saved model."""
    folder = tmp_path_factory.mktemp("llama")
    tiny_llama(tied=False).save_pretrained(folder)
    return str(folder)


def adapted(folder, config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(5)
        return peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)


def script(accelerator, folder, kind, saved):
    """The user's script: adapt, train, save the adapter, merge."""
    model = adapted(folder, ADAPTERS[kind]())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    model, optimizer, batches = accelerator.prepare(model, optimizer, loader())
    run = train(accelerator, model, optimizer, batches, clip=0.5)
    weights = accelerator.get_state_dict(model)
    module = accelerator.unwrap_model(model)
    module.save_pretrained(saved, state_dict=weights, is_main_process=accelerator.is_main_process)
    accelerator.wait_for_everyone()
    run.weights = {name: value.clone() for name, value in (weights or {}).items()}
    merged = None
    if kind != "prompt":
        with GatheredParameters(list(module.parameters()), modifier_rank=0):
            merged = {name: value.clone() for name, value in module.merge_and_unload().state_dict().items()}
    return run, merged


def adapts_like_plain(kind, folder, saved):
    with accelerating() as accelerator:
        expected, expected_merged = script(accelerator, folder, kind, f"{saved}/plain")
    with accelerating(ZERO3) as accelerator:
        run, merged = script(accelerator, folder, kind, f"{saved}/zero3")
        first = accelerator.is_main_process
    same(run, expected)
    compare(merged or {}, expected_merged or {})
    if first:
        files = [load_file(f"{saved}/{way}/adapter_model.safetensors") for way in ("zero3", "plain")]
        compare(*files)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = peft.PeftModel.from_pretrained(
                AutoModelForCausalLM.from_pretrained(folder), f"{saved}/zero3"
            )
        compare(peft.get_peft_model_state_dict(loaded), files[0])


def compare(got, expected):
    assert set(got) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(
            got[name].detach(), value.detach(), rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_of_a_model_born_sharded_is_saved_and_merged_whole(kind, llama, tmp_path):
    run_on_ranks(
        2 if kind in ("saved", "olora", "prompt") else 1, adapts_like_plain, kind, llama, str(tmp_path)
    )


def adalora():
    model = tiny_llama(tied=False)
    config = peft.AdaLoraConfig(
        task_type="CAUSAL_LM",
        target_modules=["q_proj", "up_proj"],
        init_r=4,
        target_r=2,
        tinit=1,
        tfinal=1,
        deltaT=1,
        total_step=5,
        orth_reg_weight=0.0,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, config).train()


def loss_of(model, rank):
    tokens = torch.arange(12).view(2, 6) * (rank + 3) % 37
    return model(input_ids=tokens, labels=tokens).loss


def allocates_ranks_like_plain(stage):
    twins = Twins(seeded(1, adalora), stage=stage, lr=0.05, stage3_param_persistence_threshold=1000)
    module = twins.engine.module
    for step in range(5):
        twins.backward_everywhere(loss_of)
        twins.plain.base_model.update_and_allocate(step)
        known = HfDeepSpeedConfig(twins.engine.config)  # noqa: F841  peft asks transformers whether there is one
        with GatheredParameters(module.parameters(), modifier_rank=0):
            module.base_model.update_and_allocate(step)
        unset_hf_deepspeed_config()
        twins.engine.step()
        twins.plain_step()
    patterns = [one.peft_config["default"].rank_pattern for one in (module, twins.plain)]
    assert patterns[0] == patterns[1]
    assert not all(all(kept) for kept in patterns[0].values())
    twins.finish(tolerance=1e-4)


@pytest.mark.parametrize(("ranks", "stage"), [(2, 1), (1, 2), (2, 3)])
def test_adalora_allocates_ranks_from_the_whole_gradients(ranks, stage):
    run_on_ranks(ranks, allocates_ranks_like_plain, stage)


def adds_an_adapter_late(stage, folder):
    model = adapted(folder, peft.LoraConfig(**LORA))
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1),
        config={"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}},
    )
    told: list[str] = []
    with mock.patch("deepspeed.engine.engine.warn_once", told.append):
        for use in ("default", "late"):
            if use not in model.peft_config:
                model.add_adapter(use, peft.LoraConfig(**LORA))
            model.set_adapter(use)
            engine.backward(loss_of(engine, 0))
            engine.step()
            assert bool(told) == (use == "late")
    assert "late.weight and 7 more require grad now but were not there" in told[0]
    engine.destroy()


@pytest.mark.parametrize("stage", [1, 3])
def test_an_adapter_added_to_a_running_engine_is_reported(stage, llama):
    run_on_ranks(1, adds_an_adapter_late, stage, llama)


def quantised(folder, storage):
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, bnb_4bit_quant_storage=storage
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=config, device_map={"": "cpu"}, dtype=torch.float32
        )
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        return peft.get_peft_model(model, peft.LoraConfig(**LORA, init_lora_weights=False)).train()


def trains_on_a_quantised_base(stage, storage, folder):
    twins = Twins(seeded(1, partial(quantised, folder, storage)), stage=stage, lr=0.05)
    layer = twins.engine.module.base_model.model.model.layers[0].self_attn.q_proj.base_layer
    assert type(layer).__name__ == "Linear4bit"
    assert str(layer.weight.dtype) == f"torch.{storage}"
    for _ in range(3):
        twins.backward_everywhere(loss_of)
        twins.engine.step()
        twins.plain_step()
    state = twins.engine.module_state_dict()
    for name, value in twins.plain.named_parameters():
        if value.requires_grad:
            torch.testing.assert_close(state[name], value.detach(), rtol=1e-5, atol=1e-5)
        else:  # packed numbers, of which some are no numbers when they are read as floats
            assert torch.equal(state[name].view(torch.uint8), value.view(torch.uint8)), name
    twins.engine.destroy()


@pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="bitsandbytes, which is optional, is not installed"
)
@pytest.mark.parametrize(
    ("ranks", "stage", "storage"), [(1, 2, "uint8"), (2, 0, "uint8"), (2, 3, "uint8"), (2, 3, "float32")]
)
def test_an_adapter_is_trained_on_a_quantised_frozen_base(ranks, stage, storage, llama):
    run_on_ranks(ranks, trains_on_a_quantised_base, stage, storage, llama)


def keeps_packed_bits(stage, dtype):
    bits = torch.randint(-128, 127, (64,), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    bits[-4:] = -1  # no number, read as a float of any size
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].requires_grad_(False)
    model[1].packed = nn.Parameter(bits.view(dtype), requires_grad=False)
    model[1].packed.quant_state = "as bitsandbytes marks it"
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(model[0].parameters(), lr=0.1),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        },
    )
    assert model[1].weight.dtype is torch.bfloat16
    with GatheredParameters(model[1].packed):
        assert torch.equal(model[1].packed.data.view(torch.int8), bits)
    engine.destroy()


@pytest.mark.parametrize("stage", [0, 3])
def test_packed_numbers_keep_their_bits_whatever_dtype_the_engine_has(stage):
    run_on_ranks(2, keeps_packed_bits, stage, torch.float32)
    run_on_ranks(2, keeps_packed_bits, stage, torch.bfloat16)


def copies_before_an_engine_exists():
    with deepspeed.zero.Init(config_dict_or_path={"train_micro_batch_size_per_gpu": 1}):
        module = nn.Linear(5, 7)
    copied = copy.deepcopy(module)
    assert not any(hasattr(param, "ds_id") for param in copied.parameters())
    for param, other in zip(module.parameters(), copied.parameters(), strict=True):
        assert param.ds_status is ZeroParamStatus.NOT_AVAILABLE or dist.get_world_size() == 1
        with GatheredParameters(param):
            torch.testing.assert_close(param.data, other.data, rtol=0, atol=0)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_module_born_sharded_is_copied_whole_until_an_engine_has_it(ranks):
    run_on_ranks(ranks, copies_before_an_engine_exists)
