"""TRL's trainers at stages 2 and 3 train as they do without DeepSpeed, on two ranks."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from harness import run_on_ranks
from small_lm import SENTENCES, language_model, tokenizer

STAGES = (2, 3)


def sft(_model: str, arguments: dict[str, Any]) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    return SFTTrainer(
        model=language_model(),
        args=SFTConfig(max_length=16, **arguments),
        train_dataset=Dataset.from_dict({"text": SENTENCES * 2}),
        processing_class=tokenizer(),
    )


def dpo(_model: str, arguments: dict[str, Any]) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    half = [sentence.split()[:3] for sentence in SENTENCES]
    pairs = {
        "prompt": [" ".join(words) for words in half],
        "chosen": [" ".join(sentence.split()[3:]) for sentence in SENTENCES],
        "rejected": [" ".join(words[::-1]) for words in half],
    }
    return DPOTrainer(
        model=language_model(),
        ref_model=language_model(seed=1),
        args=DPOConfig(max_length=16, **arguments),
        train_dataset=Dataset.from_dict(pairs),
        processing_class=tokenizer(),
    )


def grpo(model: str, arguments: dict[str, Any]) -> Any:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [sum(token % 3 for token in ids) / 8 for ids in completion_ids]

    return GRPOTrainer(
        model=model,  # a path: the reference model is read from it once more
        reward_funcs=reward,
        args=GRPOConfig(num_generations=4, max_completion_length=6, beta=0.1, **arguments),
        train_dataset=Dataset.from_dict({"prompt": [" ".join(one.split()[:3]) for one in SENTENCES]}),
        processing_class=tokenizer(),
    )


def equals_plain(make, model):
    from trl_runs import assert_same, trained

    make = partial(globals()[make], model)
    plain = trained(make, None)
    for stage in STAGES:
        assert_same(trained(make, stage), plain)


@pytest.mark.parametrize("make", ["sft", "dpo", "grpo"])
def test_trains_as_without_deepspeed(make, tmp_path):
    language_model().save_pretrained(tmp_path)
    run_on_ranks(2, equals_plain, make, str(tmp_path))


def kto(_model: str, arguments: dict[str, Any]) -> Any:
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    half = [sentence.split()[:3] for sentence in SENTENCES]
    answers = [" ".join(sentence.split()[3:]) for sentence in SENTENCES]
    rated = {
        "prompt": [" ".join(words) for words in half] * 2,
        "completion": answers + [" ".join(words[::-1]) for words in half],
        "label": [True] * len(half) + [False] * len(half),
    }
    return KTOTrainer(
        model=language_model(),
        ref_model=language_model(seed=1),
        args=KTOConfig(max_length=16, **arguments),
        train_dataset=Dataset.from_dict(rated),
        processing_class=tokenizer(),
    )


def judge(seed: int = 0) -> Any:
    """Make a model that gives a sequence one number."""
    import torch
    from transformers import GPT2ForSequenceClassification

    config = language_model().config
    config.num_labels = 1
    torch.manual_seed(seed)
    return GPT2ForSequenceClassification(config)


def reward(_model: str, arguments: dict[str, Any]) -> Any:
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    pairs = {"chosen": SENTENCES, "rejected": [" ".join(one.split()[::-1]) for one in SENTENCES]}
    return RewardTrainer(
        model=judge(),
        args=RewardConfig(max_length=16, **arguments),
        train_dataset=Dataset.from_dict(pairs),
        processing_class=tokenizer(),
    )


def judged_rloo(model: str, arguments: dict[str, Any]) -> Any:
    """RLOO with a reward model, which is sharded for inference like the reference model."""
    from datasets import Dataset
    from trl import RLOOConfig, RLOOTrainer

    words = tokenizer()
    return RLOOTrainer(
        model=model,
        reward_funcs=judge(seed=3),
        reward_processing_classes=words,
        args=RLOOConfig(num_generations=4, max_completion_length=6, beta=0.1, **arguments),
        train_dataset=Dataset.from_dict({"prompt": [" ".join(one.split()[:3]) for one in SENTENCES]}),
        processing_class=words,
    )


def lora_sft(_model: str, arguments: dict[str, Any]) -> Any:
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    adapter = LoraConfig(
        r=4, lora_alpha=8, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=True
    )
    arguments = {**arguments, "activation_checkpointing": True}
    return SFTTrainer(
        model=language_model(),
        args=SFTConfig(max_length=16, **arguments),
        train_dataset=Dataset.from_dict({"text": SENTENCES * 2}),
        processing_class=tokenizer(),
        peft_config=adapter,
    )


def synced_dpo(model: str, arguments: dict[str, Any]) -> Any:
    """DPO whose reference model follows the trained one: two engines' weights, mixed as they lie."""
    follow = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5}
    return dpo(model, {**arguments, **follow})


def ungathered_grpo(model: str, arguments: dict[str, Any]) -> Any:
    return grpo(model, {**arguments, "ds3_gather_for_generation": False})


def stage_3_equals_plain(make, model):
    from trl_runs import assert_same, trained

    make = partial(globals()[make], model)
    assert_same(trained(make, 3), trained(make, None))


@pytest.mark.parametrize("make", ["synced_dpo", "lora_sft", "kto", "reward", "judged_rloo"])
def test_trains_at_stage_3_as_without_deepspeed(make, tmp_path):
    language_model().save_pretrained(tmp_path)
    run_on_ranks(2, stage_3_equals_plain, make, str(tmp_path))


def gathers_once_or_for_each_use(model):
    from trl_runs import assert_same, trained

    assert_same(trained(partial(ungathered_grpo, model), 3), trained(partial(grpo, model), 3), 0.0)


def test_generation_with_and_without_hooks_gives_the_same_training(tmp_path):
    language_model().save_pretrained(tmp_path)
    run_on_ranks(2, gathers_once_or_for_each_use, str(tmp_path))
