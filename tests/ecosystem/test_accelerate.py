"""A script written for Accelerate runs as it is, and ends where it ends without DeepSpeed."""

from __future__ import annotations

import json
import os
import warnings
from functools import partial

import pytest
import schedulefree
import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, DeepSpeedSchedulerWrapper, DummyOptim, DummyScheduler
from accelerating import accelerating, forget, loader, same, sentences, tiny_llama, train, whole_weights
from deepspeed.runtime.lr_schedules import WarmupLR
from harness import run_on_ranks
from torch import nn
from transformers import AutoModelForCausalLM

import deepspeed
from deepspeed.errors import ConfigError
from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.ops.lion import DeepSpeedCPULion


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The folder of a saved model."""
    folder = tmp_path_factory.mktemp("llama")
    tiny_llama().save_pretrained(folder)
    return str(folder)


def plugin(stage: int = 2, *, save: bool = True, **options):
    """Return what makes the plugin: it reads the environment as soon as it is made."""
    return partial(
        DeepSpeedPlugin, zero_stage=stage, zero3_save_16bit_model=save, zero3_init_flag=False, **options
    )


def halving(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.8**step)


def script(accelerator, folder, *, clip=0.5):
    """The user's script: nothing in it knows of DeepSpeed."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    schedule = halving(optimizer)
    prepared = accelerator.prepare(model, optimizer, loader(), schedule)
    return train(accelerator, *prepared, clip=clip)


def one_script_twice(stage, folder, steps=2):
    with accelerating(gradient_accumulation_steps=steps) as accelerator:
        expected = script(accelerator, folder)
    asked = plugin(stage, gradient_accumulation_steps=steps, gradient_clipping=0.5)
    with accelerating(asked) as accelerator:
        same(script(accelerator, folder), expected)


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (1, 3), (2, 0), (2, 1), (2, 2), (2, 3)])
def test_a_script_ends_where_it_ends_without_deepspeed(ranks, stage, llama):
    run_on_ranks(ranks, one_script_twice, stage, llama)


CONFIG = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 0.5,
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "weight_decay": "auto", "torch_adam": True},
    },
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {
            "warmup_min_lr": "auto",
            "warmup_max_lr": "auto",
            "warmup_num_steps": "auto",
            "total_num_steps": "auto",
        },
    },
    "zero_optimization": {
        "stage": 3,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_gather_16bit_weights_on_model_save": "auto",
    },
}


def with_dummies(make_plugin, **environment):
    """Train as a script does whose optimizer and schedule stand in a file."""
    with accelerating(make_plugin, environment) as accelerator:
        ranks = accelerator.num_processes
        model = tiny_llama()
        optimizer = DummyOptim([{"params": model.parameters()}], lr=3e-3, weight_decay=0.1)
        schedule = DummyScheduler(optimizer, total_num_steps=8 * ranks, warmup_num_steps=2)
        model, optimizer, batches, schedule = accelerator.prepare(
            model, optimizer, loader(16 * ranks), schedule
        )
        settings = model.settings
        assert model.train_micro_batch_size_per_gpu() == 2
        assert model.train_batch_size() == 4 * ranks
        assert settings.zero_optimization.reduce_bucket_size == 16 * 16
        assert settings.zero_optimization.stage3_param_persistence_threshold == 160
        assert settings.steps_per_print is None or settings.steps_per_print > 1e9
        assert settings.scheduler.params["total_num_steps"] == 8
        assert isinstance(model.optimizer.optimizer, torch.optim.AdamW)
        run = train(accelerator, model, optimizer, batches, schedule, clip=0.5)
        assert schedule.get_last_lr() == model.get_lr()
    assert max(run.rates) == pytest.approx(3e-3)
    assert run.rates[-1] < max(run.rates)
    return run


def configured_three_ways(path):
    keep = {"zero3_save_16bit_model": True}
    first = with_dummies(partial(DeepSpeedPlugin, hf_ds_config=CONFIG, **keep))
    same(with_dummies(partial(DeepSpeedPlugin, hf_ds_config=path, **keep)), first, tolerance=0)
    from_environment = with_dummies(
        DeepSpeedPlugin,
        ACCELERATE_DEEPSPEED_CONFIG_FILE=path,
        ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL="true",
    )
    same(from_environment, first, tolerance=0)


@pytest.mark.parametrize("ranks", [1, 2])
def test_optimizer_and_schedule_of_a_file_stand_behind_dummies(ranks, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(CONFIG))
    run_on_ranks(ranks, configured_three_ways, str(path))


def callable_schedule():
    config = {key: value for key, value in CONFIG.items() if key != "scheduler"}
    with accelerating(partial(DeepSpeedPlugin, hf_ds_config=config)) as accelerator:
        model = tiny_llama()
        optimizer = DummyOptim(model.parameters(), lr=0.5)
        schedule = DummyScheduler(optimizer, lr_scheduler_callable=halving)
        model, optimizer, batches, schedule = accelerator.prepare(model, optimizer, loader(8), schedule)
        assert isinstance(model.lr_scheduler, torch.optim.lr_scheduler.LambdaLR)
        for batch in batches:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
        assert schedule.get_last_lr() == [pytest.approx(0.5 * 0.8**2)]
        assert schedule.get_last_lr() == [optimizer.param_groups[0]["lr"]] == model.get_lr()


def test_a_schedule_may_be_made_from_the_real_optimizer():
    run_on_ranks(1, callable_schedule)


ENVIRONMENT = {
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
    "ACCELERATE_GRADIENT_CLIPPING": "0.25",
    "ACCELERATE_MIXED_PRECISION": "bf16",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu",
}


def own_schedule_and_incomplete_accumulation():
    """A WarmupLR made by hand is the engine's; the last batches of a loader are a step though they are too few."""
    asked = plugin(2, gradient_accumulation_steps=3)
    with accelerating(asked, step_scheduler_with_optimizer=False) as accelerator:
        model = tiny_llama()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        schedule = WarmupLR(optimizer, warmup_max_lr=0.5, warmup_num_steps=4, warmup_type="linear")
        model, optimizer, batches, schedule = accelerator.prepare(model, optimizer, loader(16), schedule)
        assert type(schedule) is DeepSpeedSchedulerWrapper
        run = train(accelerator, model, optimizer, batches, schedule)
        assert model.global_steps == 3  # of 8 batches
        assert run.rates[-1] == model.get_lr()[0] == schedule.get_last_lr()[0]
        assert run.rates[-1] == pytest.approx(0.5 * 3 / 4, abs=0.13)
        assert sorted(run.rates) == run.rates


def test_a_deepspeed_schedule_and_an_incomplete_accumulation():
    run_on_ranks(1, own_schedule_and_incomplete_accumulation)


def of_arguments_and_environment():
    with accelerating(DeepSpeedPlugin, ENVIRONMENT) as accelerator:
        model = nn.Linear(4, 4)
        engine, _, _ = accelerator.prepare(model, torch.optim.AdamW(model.parameters()), loader())
        assert engine.zero_optimization_stage() == 1
        assert engine.gradient_accumulation_steps() == 4
        assert engine.gradient_clipping() == 0.25
        assert engine.bfloat16_enabled()
        assert engine.zero_use_cpu_optimizer()
        assert type(engine.optimizer.optimizer) is DeepSpeedCPUAdam
    with accelerating(plugin(3, gradient_clipping=0.75, gradient_accumulation_steps=1)) as accelerator:
        model = nn.Linear(4, 4)
        engine, _, _ = accelerator.prepare(model, torch.optim.AdamW(model.parameters()), loader())
        assert engine.zero_optimization_stage() == 3
        assert engine.gradient_accumulation_steps() == 1
        assert engine.gradient_clipping() == 0.75
        assert type(engine.optimizer.optimizer) is torch.optim.AdamW
        assert engine.zero_gather_16bit_weights_on_model_save()
    with accelerating(plugin(2)) as accelerator:  # as docs/huggingface.md warns
        model = nn.Linear(4, 4)
        engine, _, _ = accelerator.prepare(model, torch.optim.AdamW(model.parameters()), loader())
        assert engine.gradient_clipping() == 1.0


def test_a_plugin_is_made_of_arguments_and_of_the_environment():
    run_on_ranks(1, of_arguments_and_environment)


def offloaded(optimizer_class, stage, folder):
    """Accelerate puts a DeepSpeedCPUAdam (or Adagrad) in the place of torch's; the schedule is on the old one."""

    def run(accelerator):
        model = AutoModelForCausalLM.from_pretrained(folder)
        optimizer = optimizer_class(model.parameters(), lr=3e-3, weight_decay=0.1)
        prepared = accelerator.prepare(model, optimizer, loader(), halving(optimizer))
        return train(accelerator, *prepared, clip=0.5), prepared[0]

    with accelerating() as accelerator:
        expected, _ = run(accelerator)
    with (
        warnings.catch_warnings(),
        accelerating(plugin(stage, offload_optimizer_device="cpu", gradient_clipping=0.5)) as accelerator,
    ):
        warnings.filterwarnings(
            "ignore", "Detected call of `lr_scheduler.step", UserWarning
        )  # of the old one
        offloaded, engine = run(accelerator)
        assert type(engine.optimizer.optimizer).__name__.startswith("DeepSpeedCPU")
        same(offloaded, expected)


@pytest.mark.parametrize(
    ("ranks", "stage", "name"), [(1, 3, "Adam"), (1, 2, "AdamW"), (2, 3, "AdamW"), (1, 2, "Adagrad")]
)
def test_an_offloaded_optimizer_follows_the_schedule_of_the_one_it_replaces(ranks, stage, name, llama):
    run_on_ranks(ranks, offloaded, getattr(torch.optim, name), stage, llama)


def resumed(stage, mixed_precision, dummies, folder, model_folder):
    """Train 2 steps, save, train 2 more; then the same from what was saved, in an Accelerator of its own."""

    def prepare(accelerator):
        model = AutoModelForCausalLM.from_pretrained(model_folder)
        if dummies:
            optimizer = DummyOptim(model.parameters(), lr=3e-3)
            schedule = DummyScheduler(optimizer, total_num_steps=20, warmup_num_steps=2)
        else:
            optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
            schedule = halving(optimizer)
        return accelerator.prepare(model, optimizer, schedule)

    def steps(accelerator, prepared, batches):
        model, optimizer, schedule = prepared
        return train(accelerator, model, optimizer, batches, schedule)

    def make():
        config = CONFIG if dummies else {"zero_optimization": CONFIG["zero_optimization"]}
        zero = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True}
        config = {**config, "train_micro_batch_size_per_gpu": 2, "zero_optimization": zero}
        return DeepSpeedPlugin(hf_ds_config=config)

    batches = list(loader(16))
    options = {"mixed_precision": mixed_precision, "gradient_accumulation_steps": 2}
    with accelerating(make, **options) as accelerator:
        prepared = prepare(accelerator)
        steps(accelerator, prepared, batches[:4])
        accelerator.save_state(folder)
        expected = steps(accelerator, prepared, batches[4:])
    with accelerating(make, **options) as accelerator:
        prepared = prepare(accelerator)
        accelerator.load_state(folder)
        same(steps(accelerator, prepared, batches[4:]), expected, tolerance=0)


@pytest.mark.parametrize(
    ("ranks", "stage", "mixed_precision", "dummies"),
    [(1, 1, "fp16", False), (1, 3, "bf16", True), (2, 2, "bf16", False), (2, 3, "no", True)],
)
def test_a_saved_state_is_resumed_bit_by_bit(ranks, stage, mixed_precision, dummies, tmp_path, llama):
    run_on_ranks(ranks, resumed, stage, mixed_precision, dummies, str(tmp_path / "state"), llama)


def schedule_free(kind, stage, mixed_precision, folder):
    """Weights for training and for evaluation are different; both are right on every rank."""

    def run(accelerator):
        model = AutoModelForCausalLM.from_pretrained(folder)
        optimizer = kind(model.parameters(), lr=0.05)
        model, optimizer, batches = accelerator.prepare(model, optimizer, loader())
        runs = []
        for _ in range(2):
            optimizer.train()
            runs.append(train(accelerator, model, optimizer, batches, clip=0.5))
            optimizer.eval()
            model.eval()
            with torch.no_grad():  # every rank sees the averaged weights, at stage 3 too
                batch = sentences(1)[0]["input_ids"][None]
                runs[-1].losses.append(model(input_ids=batch, labels=batch).loss.item())
            runs[-1].weights |= {f"eval {k}": v for k, v in whole_weights(accelerator, model).items()}
        return runs

    with accelerating() as accelerator:
        expected = run(accelerator)
    asked = plugin(stage, gradient_clipping=0.5)
    tolerance = 3e-5 if mixed_precision == "no" else 5e-2
    with accelerating(asked, mixed_precision=mixed_precision) as accelerator:
        for one, other in zip(run(accelerator), expected, strict=True):
            one.weights = {name: value.float() for name, value in one.weights.items()}
            same(one, other, tolerance=tolerance)


@pytest.mark.parametrize(
    ("ranks", "stage", "name", "mixed_precision"),
    [
        (1, 2, "SGDScheduleFree", "no"),
        (2, 1, "SGDScheduleFree", "no"),
        (2, 2, "SGDScheduleFree", "bf16"),
        (2, 3, "AdamWScheduleFree", "no"),
    ],
)
def test_a_schedule_free_optimizer_shows_its_two_kinds_of_weights(ranks, stage, name, mixed_precision, llama):
    run_on_ranks(ranks, schedule_free, getattr(schedulefree, name), stage, mixed_precision, llama)


def counted_once():
    kept = dict(os.environ)
    try:
        accelerator = Accelerator(deepspeed_plugins=plugin(2)())  # nobody named a backend
        assert accelerator.num_processes == 1
        model = nn.Linear(4, 4)
        with pytest.raises(ConfigError) as caught:
            accelerator.prepare(model, torch.optim.SGD(model.parameters()), loader())
    finally:
        forget()
        os.environ.clear()
        os.environ.update(kept)
    assert "Accelerate counts 1 process" in str(caught.value)
    assert 'InitProcessGroupKwargs(backend="gloo")' in str(caught.value)
    assert 'PartialState(backend="gloo")' in str(caught.value)


def test_an_accelerator_that_counts_one_process_of_two_is_told_the_way_out():
    run_on_ranks(2, counted_once)


def no_word_of_accelerate():
    model = nn.Linear(4, 4)
    with pytest.raises(ConfigError) as caught:
        deepspeed.initialize(
            model=model,
            optimizer=torch.optim.SGD(model.parameters()),
            config={"train_batch_size": 2, "train_micro_batch_size_per_gpu": 2},
        )
    assert "Accelerate" not in str(caught.value)


def test_accelerate_is_not_blamed_where_it_is_not_used():
    run_on_ranks(2, no_word_of_accelerate)


def test_host_optimizers_refuse_a_mode_they_have_not():
    for kind in (DeepSpeedCPUAdagrad, DeepSpeedCPULion):
        with pytest.raises(ConfigError, match="adamw_mode: expected False, got True"):
            kind(nn.Linear(2, 2).parameters(), adamw_mode=True)
