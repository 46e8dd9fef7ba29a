"""transformers' Trainer with a DeepSpeed configuration does what the same Trainer does without one."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
import transformers
from harness import run_on_ranks
from tiny_hf import (
    OPTIMIZER,
    SCHEDULER,
    VOCABULARY,
    Tokens,
    assert_moved_alike,
    assert_same,
    causal_model,
    ds_config,
    everywhere,
    hugging_face,
    losses,
    plain,
    trainer,
    whole,
)

import deepspeed
from deepspeed.errors import UsageError
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

BY_CONFIG = (0.0, 0.0, 0.5, 1.0)
"""Factors of the configured schedule: DeepSpeed's begin at their minimum, one step before the Trainer's."""
SECTIONS = {
    "neither": {},
    "optimizer": {"optimizer": OPTIMIZER},
    "scheduler": {"scheduler": SCHEDULER},
    "both": {"optimizer": OPTIMIZER, "scheduler": SCHEDULER},
}


def trains_like_plain(folder, config, *, tolerance=1e-3, precision=None, plainly=None, **changes):
    """Train on two ranks, and plainly on the data of both; `plainly`: arguments of the latter alone."""
    with hugging_face():
        trained = trainer(folder, config, **changes, **({precision: True} if precision else {}))
        start = whole(trained.model)
        trained.train()
        actual = losses(trained), whole(trained.model)
        assert trained.deepspeed.zero_optimization_stage() == config["zero_optimization"]["stage"]
    factors = BY_CONFIG if "scheduler" in config else None
    plainly = {"per_device_train_batch_size": 4, **changes, **(plainly or {})}
    expected = plain(folder, start, factors=factors, **plainly)
    assert actual[0] == pytest.approx(expected[0], rel=tolerance)
    assert_moved_alike(start, actual[1], expected[1], tolerance)


@pytest.mark.parametrize(
    ("stage", "sections"),
    [(0, "both"), (1, "scheduler"), (2, "optimizer"), *((3, sections) for sections in SECTIONS)],
)
def test_optimizer_and_schedule_of_the_config_or_the_trainer(stage, sections, tmp_path):
    run_on_ranks(2, trains_like_plain, tmp_path, ds_config(stage, **SECTIONS[sections]))


def every_stage_in_16_bit(folder, precision):
    for stage in range(4):  # Trainers one after the other in a process, too
        trains_like_plain(folder, ds_config(stage), tolerance=0.2, precision=precision)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_16_bit_at_every_stage(precision, tmp_path):
    run_on_ranks(2, every_stage_in_16_bit, tmp_path, precision)


@pytest.mark.parametrize("device", ["cpu", "nvme"])
@pytest.mark.parametrize(("stage", "sections"), [(2, "neither"), (3, "optimizer")])
def test_offload(device, stage, sections, tmp_path):
    config = ds_config(stage, **SECTIONS[sections])
    where = {"device": device, "nvme_path": str(tmp_path)} if device == "nvme" else {"device": device}
    config["zero_optimization"]["offload_optimizer"] = where
    if stage == 3:
        config["zero_optimization"]["offload_param"] = where
    run_on_ranks(2, trains_like_plain, tmp_path, config)


@pytest.mark.parametrize("stage", [1, 3])
def test_accumulated_micro_batches_are_the_big_batch(stage, tmp_path):
    run_on_ranks(
        2,
        trains_like_plain,
        tmp_path,
        ds_config(stage, **SECTIONS["optimizer"]),
        gradient_accumulation_steps=2,
        plainly={"gradient_accumulation_steps": 1, "per_device_train_batch_size": 8},
    )


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_activations_at_stage_3(reentrant, tmp_path):
    run_on_ranks(
        2,
        trains_like_plain,
        tmp_path,
        ds_config(3),
        activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": reentrant},
    )


def evaluates_saves_and_loads_the_best(folder, stage):
    with hugging_face():
        trained = trainer(
            folder,
            ds_config(stage, **SECTIONS["both"]),
            learning_rate=0.3,  # the second half makes it worse
            eval_strategy="steps",
            save_strategy="steps",
            eval_steps=2,
            save_steps=2,
            load_best_model_at_end=True,
        )
        trained.train()
        seen = [entry["eval_loss"] for entry in trained.state.log_history if "eval_loss" in entry]
        assert seen[0] < seen[1]
        assert trained.state.best_model_checkpoint.endswith("checkpoint-2")
        assert trained.evaluate()["eval_loss"] == seen[0]
        trained.save_model(str(folder / "best"))
        best = whole(trained.model)
        dist.barrier()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder / "best")
    assert_same(whole(loaded), best)
    with torch.no_grad():
        everything = torch.stack([row["input_ids"] for row in Tokens(16)])
        assert loaded(everything, labels=everything).loss.item() == pytest.approx(seen[0], rel=1e-5)


@pytest.mark.parametrize("stage", [0, 3])
def test_the_best_model_is_loaded_and_saved_whole(stage, tmp_path):
    run_on_ranks(2, evaluates_saves_and_loads_the_best, tmp_path, stage)


def saves_a_checkpoint_instead(folder):
    config = ds_config(3, **SECTIONS["both"])
    config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = False
    with hugging_face():
        trained = trainer(folder, config)
        trained.train()
        trained.save_model(str(folder / "saved"))
        weights = whole(trained.model)
        dist.barrier()
    assert "model.safetensors" not in os.listdir(folder / "saved")
    assert_same(get_fp32_state_dict_from_zero_checkpoint(folder / "saved"), weights)


def test_weights_that_may_not_be_gathered_are_saved_as_a_checkpoint(tmp_path):
    run_on_ranks(2, saves_a_checkpoint_instead, tmp_path)


def resumes(folder, stage, sections, precision):
    changes = {"save_strategy": "steps", "save_steps": 2, **({precision: True} if precision else {})}
    with hugging_face():
        straight = trainer(folder, ds_config(stage, **SECTIONS[sections]), **changes)
        straight.train()
        expected = losses(straight), whole(straight.model)
        dist.barrier()
    with hugging_face():
        resumed = trainer(folder, ds_config(stage, **SECTIONS[sections]), **changes)
        resumed.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
        assert losses(resumed) == expected[0]
        assert_same(whole(resumed.model), expected[1])


@pytest.mark.parametrize(
    ("stage", "sections", "precision"),
    [(0, "neither", None), (1, "both", "fp16"), (2, "optimizer", "bf16"), (3, "scheduler", None)],
)
def test_resuming_changes_no_bit(stage, sections, precision, tmp_path):
    run_on_ranks(2, resumes, tmp_path, stage, sections, precision)


def only_evaluates(folder, offload):
    config = ds_config(3, **SECTIONS["both"])  # its optimizer is taken out by the Trainer, its schedule stays
    if offload:
        config["zero_optimization"]["offload_param"] = {"device": "cpu"}
    with hugging_face():
        asked = trainer(folder, config)
        loss = asked.evaluate()["eval_loss"]
        assert asked.predict(Tokens(16)).predictions.shape == (16, 8, VOCABULARY)
        assert isinstance(asked.deepspeed, deepspeed.DeepSpeedEngine)
        assert asked.deepspeed.lr_scheduler is None
        start = whole(asked.model)
    with hugging_face(deepspeed=False):
        alone = trainer(folder)
        alone.model.load_state_dict(start)
        assert loss == pytest.approx(alone.evaluate()["eval_loss"], rel=1e-5)
    with hugging_face():
        rounded = trainer(folder, ds_config(3), bf16_full_eval=True)
        assert rounded.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-2)
        assert rounded.model.dtype is torch.bfloat16


@pytest.mark.parametrize("offload", [False, True])
def test_evaluation_without_training_at_stage_3(offload, tmp_path):
    run_on_ranks(2, only_evaluates, tmp_path, offload)


def trains_after_evaluating(folder):
    with hugging_face():
        asked = trainer(folder, ds_config(3))
        asked.evaluate()
        with pytest.raises(
            UsageError, match=r"^engine\.forward: .* destroyed .* make a new engine or Trainer"
        ):
            asked.train()


def test_a_trainer_that_lost_its_engine_is_told_so(tmp_path):
    run_on_ranks(2, trains_after_evaluating, tmp_path)


def tiny_t5():
    torch.manual_seed(0)
    config = transformers.T5Config(
        d_model=16,
        d_ff=32,
        d_kv=8,
        num_layers=2,
        num_heads=2,
        vocab_size=VOCABULARY,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    return transformers.AutoModelForSeq2SeqLM.from_config(config)


def predicts_with_generate(folder, stage):
    with hugging_face():
        trained = trainer(
            folder,
            ds_config(stage, **SECTIONS["optimizer"]),
            model=tiny_t5,
            kind=transformers.Seq2SeqTrainer,
            predict_with_generate=True,
        )
        trained.train()
        predicted = trained.predict(Tokens(16), max_length=6).predictions
        weights = whole(trained.model)
    model = tiny_t5().eval()
    model.load_state_dict(weights, strict=False)
    expected = model.generate(Tokens(16).tokens, max_length=6)
    assert torch.equal(torch.tensor(predicted)[:, : expected.shape[1]], expected)


@pytest.mark.parametrize("stage", [2, 3])
def test_prediction_with_generate(stage, tmp_path):
    run_on_ranks(2, predicts_with_generate, tmp_path, stage)


class RunsOutOfMemory(transformers.Trainer):
    """One whose device has room for a batch of one."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        if len(inputs["input_ids"]) > 1:
            raise RuntimeError("CUDA out of memory. Tried to allocate 1 GiB")
        return loss


def finds_a_batch_size(folder):
    with hugging_face():
        trained = trainer(
            folder, ds_config(2, **SECTIONS["optimizer"]), kind=RunsOutOfMemory, auto_find_batch_size=True
        )
        start = whole(trained.model)
        trained.train()
        assert trained.state.train_batch_size == 1
        actual = whole(trained.model)
    _, expected = plain(folder, start)
    assert_moved_alike(start, actual, expected, 1e-3)


def test_a_batch_size_is_found_after_failures(tmp_path):
    run_on_ranks(2, finds_a_batch_size, tmp_path)


def hands_on_a_model(folder):
    weights = []
    model = causal_model()
    start = whole(model)
    for stage in (3, 1, 3, 2):
        with hugging_face():
            trained = trainer(folder, ds_config(stage), model=model, max_steps=2)
            trained.train()
            weights.append(whole(model))
    for actual in weights:
        _, expected = plain(folder, start, max_steps=2, per_device_train_batch_size=4)
        assert_moved_alike(start, actual, expected, 1e-3)
        start = actual
    assert everywhere([value.sum().item() for value in start.values()])[0] == [
        value.sum().item() for value in start.values()
    ]


def test_one_model_in_several_trainers_one_after_the_other(tmp_path):
    run_on_ranks(2, hands_on_a_model, tmp_path)
