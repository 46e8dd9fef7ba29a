"""What else Accelerate does with engines: several at once, evaluation, saving, skipped steps, freeing, refusals."""

from __future__ import annotations

import gc
import weakref
from functools import partial

import accelerate
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, DummyOptim, ParallelismConfig
from accelerating import accelerating, loader, sentences, tiny_llama, train
from harness import run_on_ranks
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader

from deepspeed import DeepSpeedEngine
from deepspeed.errors import ConfigError
from deepspeed.zero import GatheredParameters


def plugin(stage, **options):
    return partial(DeepSpeedPlugin, zero_stage=stage, zero3_save_16bit_model=True, **options)


def teacher_and_student():
    """Distil: ZeRO-2 with an optimizer, and ZeRO-3 for inference only, in one process."""
    inference = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    plugins = lambda: {  # noqa: E731
        "student": plugin(2, gradient_accumulation_steps=1, zero3_init_flag=False)(),
        "teacher": DeepSpeedPlugin(hf_ds_config=inference),
    }
    with accelerating(plugins) as accelerator:
        student = nn.Linear(6, 3)
        optimizer = torch.optim.AdamW(student.parameters(), lr=0.05)
        batches = DataLoader(torch.randn(64, 6, generator=torch.Generator().manual_seed(1)), batch_size=4)
        student, optimizer, batches = accelerator.prepare(student, optimizer, batches)
        accelerator.state.select_deepspeed_plugin("teacher")
        assert accelerator.state.deepspeed_plugin.zero_stage == 3
        second = Accelerator()
        teacher = second.prepare(nn.Linear(6, 3))
        assert teacher.eval().zero_optimization_stage() == 3
        accelerator.state.select_deepspeed_plugin("student")
        assert type(student) is type(teacher) is DeepSpeedEngine
        with GatheredParameters(teacher.module.parameters()):
            before = [param.clone() for param in teacher.module.parameters()]
        losses = []
        for _ in range(6):
            for batch in batches:
                with torch.no_grad():
                    target = teacher(batch)
                loss = nn.functional.mse_loss(student(batch), target)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
        assert losses[-1] < 0.5 * losses[0]
        with GatheredParameters(teacher.module.parameters()):
            for param, kept in zip(teacher.module.parameters(), before, strict=True):
                torch.testing.assert_close(param.data, kept.data, rtol=0, atol=0)
        second.free_memory()


@pytest.mark.parametrize("ranks", [1, 2])
def test_two_models_with_plugins_of_their_own_live_side_by_side(ranks):
    run_on_ranks(ranks, teacher_and_student)


def frees(stage):
    with accelerating(plugin(stage, zero3_init_flag=False)) as accelerator:
        kept = []
        for _ in range(2):  # the second training starts as if there had been no first
            model = tiny_llama()
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
            model, optimizer, batches = accelerator.prepare(model, optimizer, loader(4))
            run = train(accelerator, model, optimizer, batches)
            engine = weakref.ref(model)
            model, optimizer, batches = accelerator.free_memory(model, optimizer, batches)
            gc.collect()
            assert model is None
            assert engine() is None
            kept.append(run)
    assert kept[0].losses == kept[1].losses


@pytest.mark.parametrize("stage", [2, 3])
def test_free_memory_frees_the_engine_for_the_next_training(stage):
    run_on_ranks(1, frees, stage)


def evaluates_and_saves(stage, folder):
    with accelerating(plugin(stage, zero3_init_flag=False)) as accelerator:
        plain = tiny_llama()
        with GatheredParameters(plain.parameters()):
            expected = {name: value.clone() for name, value in plain.state_dict().items()}
        samples = sentences(7)  # not a multiple of ranks x batch
        model, batches = accelerator.prepare(plain, DataLoader(samples, batch_size=2))
        assert accelerator.unwrap_model(model) is plain
        model.eval()
        seen = []
        with torch.no_grad():
            for batch in batches:
                logits = model(input_ids=batch["input_ids"]).logits
                seen.append(accelerator.gather_for_metrics((logits.argmax(-1), batch["input_ids"])))
        inputs = torch.cat([one for _, one in seen])
        torch.testing.assert_close(inputs, torch.stack([one["input_ids"] for one in samples]))
        accelerator.save_model(model, f"{folder}/model")
        if accelerator.is_main_process:
            saved = load_file(f"{folder}/model/model.safetensors")
            assert set(expected) - set(saved) <= {"lm_head.weight"}  # tied
            for name, value in saved.items():
                torch.testing.assert_close(value, expected[name], rtol=0, atol=0)


@pytest.mark.parametrize(("ranks", "stage"), [(2, 2), (1, 3), (2, 3)])
def test_a_model_without_an_optimizer_is_evaluated_and_saved_whole(ranks, stage, tmp_path):
    run_on_ranks(ranks, evaluates_and_saves, stage, str(tmp_path))


def keeps_its_weights_to_itself():
    closed = partial(DeepSpeedPlugin, zero_stage=3, zero3_save_16bit_model=False, zero3_init_flag=False)
    with accelerating(closed) as accelerator:
        engine = accelerator.prepare(tiny_llama(), loader())[0]
        with pytest.raises(ValueError, match="stage3_gather_16bit_weights_on_model_save"):
            accelerator.get_state_dict(engine)


def test_weights_of_stage_3_are_gathered_only_if_the_plugin_says_so():
    run_on_ranks(1, keeps_its_weights_to_itself)


def skips():
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "fp16": {"enabled": True, "initial_scale_power": 4, "hysteresis": 1},
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "Adam", "params": {"lr": 0.1}},
    }
    with accelerating(partial(DeepSpeedPlugin, hf_ds_config=config), mixed_precision="fp16") as accelerator:
        model = nn.Linear(4, 1)
        model, _ = accelerator.prepare(model, DummyOptim(model.parameters()))
        skipped = []
        for factor in (1.0, float("inf"), 1.0):
            before = model.module.weight.detach().clone()
            accelerator.backward(model(torch.ones(2, 4)).sum() * factor)
            skipped.append(accelerator.optimizer_step_was_skipped)
            assert torch.equal(before, model.module.weight) == skipped[-1]
        assert skipped == [False, True, False]
        assert model.skipped_steps == 1


def test_a_step_that_overflows_is_known_as_skipped():
    run_on_ranks(1, skips)


def compiles(stage, regional):
    options = accelerate.utils.TorchDynamoPlugin(backend="eager", use_regional_compilation=regional)
    with accelerating(plugin(stage, zero3_init_flag=False), dynamo_plugin=options) as accelerator:
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
        with GatheredParameters(model.parameters()):
            expected = model(torch.ones(2, 4)).sum()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model, optimizer, _ = accelerator.prepare(model, optimizer, loader())
        loss = model(torch.ones(2, 4)).sum()
        torch.testing.assert_close(loss, expected)
        accelerator.backward(loss)
        assert model(torch.ones(2, 4)).sum() < loss


@pytest.mark.parametrize(("stage", "regional"), [(2, False), (3, False), (3, True)])
def test_a_dynamo_plugin_compiles_the_engine(stage, regional):
    run_on_ranks(1, compiles, stage, regional)


def splits_sequences():
    asked = ParallelismConfig(sp_backend="deepspeed", sp_size=2)
    with accelerating(plugin(3, zero3_init_flag=False), parallelism_config=asked) as accelerator:
        model = tiny_llama()
        optimizer = torch.optim.AdamW(model.parameters())
        with pytest.raises(ImportError, match=r"ulysses_sp\.\w+: sequence parallelism is not built yet$"):
            accelerator.prepare(model, optimizer, loader())


def test_sequence_parallelism_is_refused_in_one_sentence():
    run_on_ranks(2, splits_sequences)


def names_no_folder(environment):
    with accelerating(plugin(3), environment) as accelerator:
        model = nn.Linear(4, 4)
        with pytest.raises(ConfigError, match=r'nvme_path: expected a folder with device nvme, got "none"'):
            accelerator.prepare(model, torch.optim.AdamW(model.parameters()), loader())


def test_disk_without_a_folder_is_refused():
    run_on_ranks(1, names_no_folder, {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "nvme"})
