"""With `HfDeepSpeedConfig` of stage 3 alive, transformers builds, loads and resizes models that are sharded."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import transformers
from accelerate import init_empty_weights
from harness import run_on_ranks
from safetensors.torch import load_file, save_file
from tiny_hf import (
    VOCABULARY,
    Tokens,
    assert_moved_alike,
    assert_same,
    causal_model,
    ds_config,
    everywhere,
    hugging_face,
    llama_config,
    plain,
    trainer,
    whole,
)
from transformers.integrations.deepspeed import HfDeepSpeedConfig

import deepspeed
from deepspeed.errors import ConfigError


def mixtral_config():
    return transformers.MixtralConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=32,
        bos_token_id=1,
        eos_token_id=2,
    )


def gpt2_config():
    return transformers.GPT2Config(
        n_layer=2, n_embd=16, n_head=2, vocab_size=VOCABULARY, n_positions=32, bos_token_id=1, eos_token_id=2
    )


def bert_config():
    return transformers.BertConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=32,
    )


def wav2vec2_config():
    return transformers.Wav2Vec2Config(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        conv_dim=(8, 8),
        conv_kernel=(3, 3),
        conv_stride=(2, 2),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        mask_time_prob=0.0,
        layerdrop=0.0,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        feat_proj_dropout=0.0,
        final_dropout=0.0,
        vocab_size=8,
        ctc_loss_reduction="mean",
        ctc_zero_infinity=True,
    )


MODELS = {
    "llama": (transformers.LlamaForCausalLM, llama_config),
    "tied": (transformers.LlamaForCausalLM, lambda: llama_config(tie_word_embeddings=True)),
    "gpt2": (transformers.GPT2LMHeadModel, gpt2_config),
    "bert": (transformers.BertForMaskedLM, bert_config),  # its output embeddings have a bias
    "mixtral": (transformers.MixtralForCausalLM, mixtral_config),
    "wav2vec2": (transformers.Wav2Vec2ForCTC, wav2vec2_config),
}


def stage_3(**changes):
    """Return what has to stay alive while models are made."""
    return HfDeepSpeedConfig(
        {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}, **changes}
    )


def write_model(folder, kind, edit=None, **options):
    """Let the first rank save a model; `edit` changes the tensors of its file."""
    if dist.get_rank() == 0:
        cls, config = MODELS[kind]
        torch.manual_seed(3)
        cls(config()).save_pretrained(folder, **options)
        if edit is not None:
            tensors = load_file(folder / "model.safetensors")
            edit(tensors)
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    dist.barrier()


def batch(kind):
    if kind == "wav2vec2":
        return {"input_values": torch.randn(2, 80, generator=torch.Generator().manual_seed(0))}
    return {"input_ids": Tokens(3).tokens}


def loads_as_plain(folder, kind, zero, dtype, options):
    write_model(folder, kind, **options)
    cls, _ = MODELS[kind]
    expected = cls.from_pretrained(folder, dtype=dtype).eval()
    with hugging_face():
        config = stage_3(bf16={"enabled": dtype is torch.bfloat16}, zero_optimization={"stage": 3, **zero})
        model = cls.from_pretrained(folder, dtype=dtype)
        assert hasattr(model.get_parameter(next(iter(dict(model.named_parameters())))), "ds_id")
        engine, *_ = deepspeed.initialize(model=model, config=config.config)
        engine.eval()
        assert_same(whole(engine), whole(expected))
        for name, buffer in expected.named_buffers():
            torch.testing.assert_close(model.get_buffer(name), buffer, rtol=0, atol=0)
        with torch.no_grad():
            torch.testing.assert_close(engine(**batch(kind)).logits, expected(**batch(kind)).logits)
        engine.destroy()


@pytest.mark.parametrize(
    ("kind", "zero", "dtype", "options"),
    [
        ("llama", {}, torch.bfloat16, {}),
        ("llama", {}, torch.float32, {"max_shard_size": "10KB"}),
        ("llama", {"offload_param": {"device": "cpu"}}, torch.float32, {}),
        ("llama", {"offload_param": {"device": "nvme"}}, torch.bfloat16, {"max_shard_size": "10KB"}),
        ("tied", {}, torch.float32, {}),
        ("gpt2", {}, torch.float32, {}),
        ("bert", {}, torch.float32, {}),
        ("mixtral", {}, torch.float32, {}),
        ("wav2vec2", {}, torch.float32, {}),
    ],
    ids=["bf16", "many_files", "cpu", "nvme", "tied", "gpt2", "bert", "experts", "weight_norm"],
)
def test_from_pretrained(kind, zero, dtype, options, tmp_path):
    if zero.get("offload_param", {}).get("device") == "nvme":
        zero["offload_param"]["nvme_path"] = str(tmp_path)
    run_on_ranks(2, loads_as_plain, tmp_path / "model", kind, zero, dtype, options)


MISSING = ("model.layers.1.mlp.up_proj.weight", "model.layers.1.input_layernorm.weight")


def fills_what_is_missing(folder, kind):
    def edit(tensors):
        for name in MISSING:
            del tensors[name]

    write_model(folder, kind, edit=edit)
    cls, _ = MODELS[kind]
    with hugging_face():
        expected = cls.from_pretrained(folder)
        config = stage_3()
        torch.manual_seed(dist.get_rank())
        model, report = cls.from_pretrained(folder, output_loading_info=True)
        assert sorted(report["missing_keys"]) == sorted(MISSING)
        assert config.is_zero3()
        actual = whole(model)
    made = {name: actual[name] for name in MISSING}
    assert (
        everywhere(made["model.layers.1.mlp.up_proj.weight"].sum().item())
        == [made["model.layers.1.mlp.up_proj.weight"].sum().item()] * dist.get_world_size()
    )
    assert made[MISSING[0]].std() == pytest.approx(0.02, rel=0.2)
    assert torch.equal(made[MISSING[1]], torch.ones(16))
    assert_same({**actual, **made}, {**whole(expected), **made})


@pytest.mark.parametrize("kind", ["llama", "tied"])
def test_missing_weights_are_initialised_alike_on_all_ranks(kind, tmp_path):
    run_on_ranks(2, fills_what_is_missing, tmp_path, kind)


def builds_alike(kind):
    cls, config = MODELS[kind]
    with hugging_face():
        settings = stage_3()
        torch.manual_seed(dist.get_rank())
        model = cls._from_config(config())
        assert all(hasattr(param, "ds_id") for param in model.parameters())
        assert settings.is_zero3()
        actual = whole(model)
    sums = [value.double().sum().item() for value in actual.values()]
    assert everywhere(sums) == [sums] * dist.get_world_size()
    expected = whole(cls(config()))
    for name, value in actual.items():
        scale = max(expected[name].std().item(), 0.01)
        assert value.std().item() == pytest.approx(expected[name].std().item(), abs=0.5 * scale), name
        assert value.mean().item() == pytest.approx(expected[name].mean().item(), abs=scale), name


@pytest.mark.parametrize("kind", ["tied", "gpt2", "bert", "mixtral"])
def test_from_config(kind):
    run_on_ranks(2, builds_alike, kind)


def fills_weight_norms():
    cls, config = MODELS["wav2vec2"]
    with hugging_face():
        settings = stage_3()
        torch.manual_seed(dist.get_rank())
        junk = torch.full((2, 8192), 1e30)  # what memory holds when nobody fills it
        del junk
        engine, *_ = deepspeed.initialize(model=cls._from_config(config()), config=settings.config)
        actual = whole(engine)
        engine.destroy()
    sums = [value.double().sum().item() for value in actual.values()]
    assert everywhere(sums) == [sums] * dist.get_world_size()
    for name, value in whole(cls._from_config(config())).items():
        if "parametrizations" in name:
            assert actual[name].std().item() == pytest.approx(value.std().item(), rel=0.8), name
            assert actual[name].norm().item() == pytest.approx(value.norm().item(), rel=0.2), name


def test_weight_norms_of_a_model_from_a_configuration_are_initialised():
    run_on_ranks(2, fills_weight_norms)


def meets_meta(folder):
    write_model(folder, "llama", max_shard_size="10KB")
    expected = transformers.LlamaForCausalLM.from_pretrained(folder)
    with hugging_face():
        settings = stage_3()
        for nothing in (torch.device("meta"), init_empty_weights()):
            with nothing:
                model = transformers.AutoModelForCausalLM.from_config(llama_config())
            assert all(param.is_meta for param in model.parameters())
            with pytest.raises(ConfigError, match="got one on the meta device"):
                deepspeed.initialize(model=model, config=settings.config)
        model.load_state_dict(expected.state_dict(), assign=True)  # values, whole, for the one that has none
        engine, *_ = deepspeed.initialize(model=model, config=settings.config)
        assert_same(whole(engine), whole(expected))
        engine.destroy()
        model = transformers.LlamaForCausalLM.from_pretrained(folder, low_cpu_mem_usage=True)
        assert all(hasattr(param, "ds_id") for param in model.parameters())
        assert_same(whole(model), whole(expected))


def test_a_model_on_meta_stays_there_until_it_has_values(tmp_path):
    run_on_ranks(2, meets_meta, tmp_path / "model")


def resizes_and_trains(kind):
    cls, config = MODELS[kind]
    with hugging_face():
        settings = stage_3()
        torch.manual_seed(dist.get_rank())
        model = cls._from_config(config())
        before = whole(model)["model.embed_tokens.weight"]
        model.resize_token_embeddings(VOCABULARY + 6)
        assert torch.equal(whole(model)["model.embed_tokens.weight"][:VOCABULARY], before)
        model.resize_token_embeddings(VOCABULARY - 10)
        model.resize_token_embeddings(pad_to_multiple_of=64)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == (kind == "tied")
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), config=settings.config
        )
        after = whole(engine)["model.embed_tokens.weight"]
        assert after.shape == (64, 16)
        assert torch.equal(after[: VOCABULARY - 10], before[: VOCABULARY - 10])
        assert everywhere(after.sum().item()) == [after.sum().item()] * dist.get_world_size()
        tokens = Tokens(3).tokens % (VOCABULARY - 10)
        losses = []
        for _ in range(3):
            loss = engine(input_ids=tokens, labels=tokens).loss
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        assert losses[2] < losses[1] < losses[0]
        engine.destroy()


@pytest.mark.parametrize("kind", ["llama", "tied"])
def test_token_embeddings_are_resized(kind):
    run_on_ranks(2, resizes_and_trains, kind)


class Waves(torch.utils.data.Dataset):
    """Sounds and what is said."""

    def __len__(self):
        return 32

    def __getitem__(self, index):
        wave = torch.randn(80, generator=torch.Generator().manual_seed(index))
        return {"input_values": wave, "labels": torch.tensor([1, 2, index % 5 + 1])}


def trains_from_pretrained(folder, kind):
    write_model(folder, kind)
    cls, config = MODELS[kind]
    data = Waves() if kind == "wav2vec2" else Tokens()
    with hugging_face():
        trained = trainer(folder, ds_config(3), model=lambda: cls.from_pretrained(folder), data=data)
        trained.train()
        actual = whole(trained.model)
    start = whole(cls.from_pretrained(folder))
    _, expected = plain(folder, start, model=cls(config()), data=data, per_device_train_batch_size=4)
    assert_moved_alike(start, actual, expected, 0.01)


@pytest.mark.parametrize("kind", ["mixtral", "wav2vec2"])
def test_experts_and_weight_norms_train_as_they_do_plainly(kind, tmp_path):
    run_on_ranks(2, trains_from_pretrained, tmp_path, kind)


def generates_in_steps_of_its_own():
    rank = dist.get_rank()
    prompt = torch.randint(3, VOCABULARY, (2, 3 + 2 * rank), generator=torch.Generator().manual_seed(rank))
    ways = {
        "first_rank_ends_early": {"max_new_tokens": 4 + 8 * rank},
        "second_rank_ends_early": {"max_new_tokens": 12 - 8 * rank},
        "beams": {"max_new_tokens": 4 + 3 * rank, "num_beams": 3},
        "without_cache": {"max_new_tokens": 4 + 3 * rank, "use_cache": False},
    }
    with hugging_face():
        settings = stage_3()
        model = causal_model(llama_config(initializer_range=0.5))
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), config=settings.config
        )
        made = {}
        for name, options in ways.items():  # in the middle of training
            loss = engine(input_ids=prompt, labels=prompt).loss
            engine.backward(loss)
            engine.step()
            engine.eval()
            answer = model.generate(prompt, do_sample=False, synced_gpus=True, **options)
            engine.train()
            made[name] = whole(engine), answer
        with deepspeed.zero.GatheredParameters(model.parameters()):
            if rank == 0:  # alone
                alone = model.generate(prompt, do_sample=False, synced_gpus=False, max_new_tokens=5)
                assert torch.equal(alone[:, : prompt.shape[1]], prompt)
        engine.destroy()
    for name, (weights, answer) in made.items():
        reference = causal_model(llama_config(initializer_range=0.5)).eval()
        reference.load_state_dict(weights)
        assert torch.equal(answer, reference.generate(prompt, do_sample=False, **ways[name])), name


def test_ranks_that_finish_generating_at_different_times():
    run_on_ranks(2, generates_in_steps_of_its_own)
