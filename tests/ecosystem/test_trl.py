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
