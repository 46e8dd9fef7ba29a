"""What scripts do with an engine: every form of its arguments, its attributes, and its errors."""

from __future__ import annotations

import base64
import copy
import gc
import io
import json
import weakref
from argparse import ArgumentParser, Namespace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from harness import on_ranks, run_on_ranks
from torch import nn
from toys import make_toy, toy_batch, toy_loss
from training import config_for

import deepspeed
from deepspeed.errors import ConfigError, LossScaleError, NotBuiltError, UsageError

SAMPLES = Path(__file__).parent.parent / "config" / "samples"


def linear_config(**more):
    return {"train_batch_size": 4, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}, **more}


def train_one_step(engine, rows=4):
    loss = engine(torch.ones(rows, 3)).square().mean()
    engine.backward(loss)
    engine.step()
    return loss


@on_ranks(1)
def test_every_form_of_the_configuration():
    config = linear_config()
    text = json.dumps(config)
    encoded = base64.urlsafe_b64encode(text.encode()).decode()
    path = Path(f"/tmp/ds_config_{id(config)}.json")
    path.write_text(text)
    parsed = deepspeed.add_config_arguments(ArgumentParser()).parse_args(
        ["--deepspeed", "--deepspeed_config", str(path)]
    )
    try:
        for arguments in (
            {"config": config},
            {"config": str(path)},
            {"config": encoded},
            {"config_params": config},
            {"args": parsed},
            {"args": {"local_rank": 0}, "config": config},
            {"args": Namespace(device_rank=0), "config": config},
        ):
            engine, optimizer, loader, scheduler = deepspeed.initialize(model=nn.Linear(3, 2), **arguments)
            train_one_step(engine)
            assert engine.global_steps == 1
            assert optimizer is engine.optimizer
            assert loader is None
            assert scheduler is None
        assert engine.config is config
    finally:
        path.unlink()


@on_ranks(1)
def test_wrong_arguments_are_named():
    with pytest.raises(ConfigError, match="config: expected a dict"):
        deepspeed.initialize(model=nn.Linear(1, 1))
    with pytest.raises(ConfigError, match=r"model: expected a torch\.nn\.Module, got str"):
        deepspeed.initialize(model="gpt", config={})
    with pytest.raises(ConfigError, match="one source"):
        deepspeed.initialize(model=nn.Linear(1, 1), config={"train_batch_size": 1}, config_params={"a": 1})
    other = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="build the optimizer after the model"):
        deepspeed.initialize(model=nn.Linear(1, 1), optimizer=other, config={"train_batch_size": 1})
    quantised = linear_config(zero_optimization={"stage": 3, "zero_quantized_weights": True})
    with pytest.raises(NotBuiltError, match=r"zero_optimization\.zero_quantized_weights"):
        deepspeed.initialize(model=nn.Linear(1, 1), config=quantised)


@on_ranks(1)
def test_every_form_of_parameters_optimizer_and_schedule():
    config = {"train_batch_size": 4}
    make_sgd = partial(torch.optim.SGD, lr=0.1)
    make_schedule = partial(torch.optim.lr_scheduler.StepLR, step_size=1)
    for form in ("instance", "callable", "groups", "generator", "named"):
        model = nn.Linear(3, 2)
        arguments = {
            "instance": {"optimizer": make_sgd(model.parameters())},
            "callable": {"optimizer": make_sgd},
            "groups": {
                "optimizer": make_sgd,
                "model_parameters": [{"params": [model.weight]}, {"params": model.bias}],
            },
            "generator": {"optimizer": make_sgd, "model_parameters": (p for p in model.parameters())},
            "named": {"optimizer": make_sgd, "model_parameters": model.named_parameters()},
        }[form]
        before = model.weight.detach().clone()
        engine, optimizer, _, scheduler = deepspeed.initialize(
            model=model, config=config, lr_scheduler=make_schedule, **arguments
        )
        train_one_step(engine)
        assert not torch.equal(model.weight, before)
        assert isinstance(optimizer.optimizer, torch.optim.SGD)
        assert optimizer.param_groups is optimizer.optimizer.param_groups
        assert scheduler.get_last_lr()[0] == pytest.approx(0.01)
        assert engine.get_lr()[0] == pytest.approx(0.01)


@on_ranks(1)
def test_a_schedule_on_the_clients_optimizer_drives_the_step():
    model = nn.Linear(3, 2, bias=False)
    client = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(client, lambda step: 0.0 if step else 1.0)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=client, config={"train_batch_size": 4, "gradient_clipping": 0.0}
    )
    train_one_step(engine)
    schedule.step()
    before = model.weight.detach().clone()
    train_one_step(engine)
    assert torch.equal(model.weight, before)


OPTIMIZERS = {
    "SGD": ({"lr": 0.05, "momentum": 0.9}, partial(torch.optim.SGD, lr=0.05, momentum=0.9), None),
    "Adagrad": ({"lr": 0.05}, partial(torch.optim.Adagrad, lr=0.05, eps=1e-10), None),
    "Adafactor": ({"lr": 0.05}, partial(torch.optim.Adafactor, lr=0.05), 1e-5),
    "RMSprop": ({"lr": 0.01}, partial(torch.optim.RMSprop, lr=0.01), None),
}


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_by_name_equal_torch(stage, name):
    run_on_ranks(2, optimizer_by_name, stage, name)


def optimizer_by_name(stage, name):
    params, make_reference, tolerance = OPTIMIZERS[name]
    compare_with_one_rank({"type": name, "params": params}, stage, make_reference, tolerance or 3e-6)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(
    "section",
    [
        {"type": "Lamb", "params": {"lr": 0.02, "weight_decay": 0.1}},
        {"type": "Lion", "params": {"lr": 0.002, "weight_decay": 0.1}},
        {"type": "Muon", "params": {"muon_lr": 0.02, "adam_lr": 0.003, "weight_decay": 0.1}},
    ],
    ids=lambda section: section["type"],
)
@pytest.mark.parametrize("ranks", [2, 3])
def test_sharded_optimizers_equal_themselves_on_whole_parameters(stage, section, ranks):
    run_on_ranks(ranks, sharded_against_whole, section, stage)


def sharded_against_whole(section, stage):
    from deepspeed.engine.optimizers import mark_for_muon
    from deepspeed.ops.factory import build_optimizer

    def make_reference(model):
        mark_for_muon(model)
        groups = [{"params": [param for param in model.parameters() if param.requires_grad]}]
        return build_optimizer(section["type"], section["params"], groups)

    compare_with_one_rank(section, stage, make_reference, 1e-5, from_model=True)


def compare_with_one_rank(section, stage, make_reference, tolerance, from_model=False):
    plain, ranks, rank = make_toy(), dist.get_world_size(), dist.get_rank()
    trained = [param for param in plain.parameters() if param.numel()]
    reference = make_reference(plain if from_model else trained)
    config = {**config_for(stage, "fp32", 2, 0.3), "optimizer": section}
    engine, *_ = deepspeed.initialize(model=make_toy(), config=config)
    for step in range(4):
        for micro in range(2):
            engine.backward(toy_loss(engine, toy_batch(step, micro, rank)))
            engine.step()
        batches = [toy_batch(step, micro, r) for micro in range(2) for r in range(ranks)]
        (sum(toy_loss(plain, batch) for batch in batches) / len(batches)).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.3)
        reference.step()
        reference.zero_grad()
    for (name, ours), theirs in zip(engine.module.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(
            ours, theirs, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


class NormOfAll(torch.optim.SGD):
    """Divides by the norm of all gradients: cannot be sharded."""

    @torch.no_grad()
    def step(self, closure=None):
        params = [param for group in self.param_groups for param in group["params"]]
        norm = torch.stack([param.grad.norm() for param in params]).norm()
        for param in params:
            param.sub_(param.grad / norm)


@on_ranks(2)
def test_an_optimizer_that_cannot_be_sharded_is_refused():
    model = make_toy()
    with pytest.raises(ConfigError, match=r"NormOfAll mixes values.*stage 0"):
        deepspeed.initialize(
            model=model, optimizer=NormOfAll(model.parameters(), lr=1.0), config=config_for(1, "fp32", 1, 0.0)
        )


@on_ranks(2)
def test_param_groups_keep_their_own_settings():
    model, plain = make_toy(), make_toy()

    def groups(of):
        matrices = [param for param in of.parameters() if param.dim() >= 2]
        rest = [param for param in of.parameters() if param.dim() < 2]
        return [{"params": matrices, "weight_decay": 0.5}, {"params": rest, "lr": 0.1, "weight_decay": 0.0}]

    config = config_for(2, "fp32", 1, 0.0)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups(model), config=config)
    reference = torch.optim.AdamW(groups(plain), lr=0.01, betas=(0.9, 0.95))
    for step in range(3):
        engine.backward(toy_loss(engine, toy_batch(step, 0, dist.get_rank())))
        engine.step()
        (sum(toy_loss(plain, toy_batch(step, 0, rank)) for rank in range(2)) / 2).backward()
        reference.step()
        reference.zero_grad()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_fp16_overflow_skips_the_step_the_schedule_and_halves_the_scale(stage):
    run_on_ranks(2, overflowing, stage)


def overflowing(stage):
    config = linear_config(
        fp16={"enabled": True, "initial_scale_power": 4, "hysteresis": 1, "min_loss_scale": 4},
        zero_optimization={"stage": stage},
        scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": 10, "warmup_max_lr": 0.1}},
    )
    engine, _, _, scheduler = deepspeed.initialize(model=nn.Linear(3, 2), config=config)
    before = engine.module.weight.detach().clone()
    for scale in (8.0, 4.0):
        bad = float("inf") if dist.get_rank() == 1 else 1.0
        engine.backward((engine(torch.ones(2, 3)) * bad).float().mean())
        engine.step()
        assert engine.cur_scale == scale
    assert not engine.was_step_applied()
    assert engine.optimizer.overflow
    assert engine.skipped_steps == engine.global_steps == 2
    assert scheduler.last_batch_iteration == -1
    assert torch.equal(engine.module.weight, before)
    engine.backward((engine(torch.ones(2, 3)) * float("nan")).float().mean())
    with pytest.raises(LossScaleError, match=r"min_loss_scale"):
        engine.step()


@on_ranks(1)
def test_the_originals_example_runs_with_fp32_data_in_an_fp16_model():
    config = json.loads((SAMPLES / "simple_fp16.json").read_text())
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5))
    data, labels = torch.randn(32, 8), torch.randint(0, 5, (32,))
    model_engine, _optimizer, _, _ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=config
    )
    losses = []
    for _ in range(30):
        outputs = model_engine(data)
        loss = nn.CrossEntropyLoss()(outputs, labels)
        model_engine.backward(loss)
        model_engine.step()
        losses.append(loss.item())
    assert outputs.dtype == torch.float16
    assert losses[-1] < losses[0]


@on_ranks(2)
def test_the_tutorials_zero2_file_trains_with_a_client_optimizer():
    model = make_toy()
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.Adam(model.parameters()), config=str(SAMPLES / "zero2.json")
    )
    assert engine.train_micro_batch_size_per_gpu() == 16
    engine.backward(toy_loss(engine, toy_batch(0, 0, dist.get_rank())))
    engine.step()
    assert engine.was_step_applied()


@on_ranks(1)
def test_auto_batch_size_comes_from_the_first_batch():
    config = linear_config(train_batch_size="auto", train_micro_batch_size_per_gpu="auto")
    engine, *_ = deepspeed.initialize(model=nn.Linear(3, 2), config=config)
    assert engine.train_batch_size() is None
    train_one_step(engine, rows=7)
    assert (engine.train_batch_size(), engine.global_samples) == (7, 7)


@on_ranks(2)
def test_counters_and_batch_changes():
    config = {**linear_config(), "train_batch_size": 16, "train_micro_batch_size_per_gpu": 2}
    engine, *_ = deepspeed.initialize(model=nn.Linear(3, 2), config=config)
    assert engine.gradient_accumulation_steps() == 4
    boundaries = []
    for _ in range(8):
        boundaries.append(engine.is_gradient_accumulation_boundary())
        train_one_step(engine, rows=2)
    assert boundaries == [False, False, False, True] * 2
    assert (engine.micro_steps, engine.global_steps, engine.global_samples) == (8, 2, 32)
    engine.set_train_batch_size(8)
    assert engine.get_batch_info() == (8, 2, 2)
    engine.set_train_micro_batch_size(3)
    assert engine.get_batch_info() == (12, 3, 2)
    with pytest.raises(ConfigError, match="train_batch_size"):
        engine.set_train_batch_size(13)


@on_ranks(1)
def test_attributes_of_the_module_are_the_engines():
    model = nn.Linear(3, 2)
    model.vocabulary = 77
    engine, *_ = deepspeed.initialize(model=model, config=linear_config())
    assert engine.vocabulary == 77
    assert engine.in_features == 3
    assert engine.module is model
    assert type(engine) is deepspeed.DeepSpeedEngine
    with pytest.raises(AttributeError, match="no_such"):
        _ = engine.no_such
    engine.eval()
    assert not model.training


@on_ranks(1)
def test_an_engine_without_optimizer_runs_forward_only():
    config = {
        "train_batch_size": 4,
        "scheduler": {"type": "WarmupLR", "params": {}},
        "zero_optimization": {"stage": 2},
    }
    engine, optimizer, _, scheduler = deepspeed.initialize(model=nn.Linear(3, 2), config=config)
    assert optimizer is None
    assert scheduler is None
    loss = engine(torch.ones(4, 3)).sum()
    with pytest.raises(UsageError, match="no optimizer"):
        engine.backward(loss)


@on_ranks(1)
def test_backward_wants_a_scalar():
    engine, *_ = deepspeed.initialize(model=nn.Linear(3, 2), config=linear_config())
    with pytest.raises(UsageError, match=r"shape \(4, 2\)"):
        engine.backward(engine(torch.ones(4, 3)))
    with pytest.raises(UsageError, match="requires_grad=False"):
        engine.backward(torch.tensor(1.0))


@on_ranks(2)
def test_an_exception_in_backward_leaves_a_working_engine():
    class Explode(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise ArithmeticError("on purpose")

    engine, *_ = deepspeed.initialize(
        model=nn.Linear(3, 2), config=linear_config(zero_optimization={"stage": 2})
    )
    with pytest.raises(ArithmeticError, match="on purpose"):
        engine.backward(Explode.apply(engine(torch.ones(2, 3))).sum())
    train_one_step(engine, rows=2)
    assert engine.was_step_applied()


@on_ranks(2)
def test_copies_and_pickles_of_the_module_leave_the_engine_behind():
    engine, *_ = deepspeed.initialize(model=make_toy(), config=config_for(2, "bf16", 1, 0.0))
    twin = copy.deepcopy(engine.module)
    buffer = io.BytesIO()
    torch.save(engine.module.state_dict(), buffer)
    loss = toy_loss(twin, toy_batch(0, 0, 0))
    loss.backward()
    assert all(param.grad is not None for param in twin.parameters())
    assert engine.optimizer.units[0].flat.isfinite().all()
    engine.backward(toy_loss(engine, toy_batch(0, 0, dist.get_rank())))
    engine.step()
    assert engine.was_step_applied()


@on_ranks(1)
def test_a_module_may_be_initialized_again_and_engines_leave_no_trace():
    model = nn.Linear(3, 2)
    references = []
    for _ in range(3):
        engine = deepspeed.initialize(model=model, config=linear_config())[0]
        train_one_step(engine)
        assert engine.global_steps == 1
        references.append(weakref.ref(engine))
    engine.destroy()
    del engine
    gc.collect()
    assert [reference() for reference in references] == [None] * 3
    assert not model._forward_hooks
    assert not model.weight._post_accumulate_grad_hooks
    model(torch.ones(1, 3)).sum().backward()


@on_ranks(2)
def test_parameters_of_several_dtypes_and_a_frozen_integer_one():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.low, self.high = nn.Linear(4, 4).bfloat16(), nn.Linear(4, 1)
            self.codes = nn.Parameter(torch.arange(3), requires_grad=False)

        def forward(self, x):
            return self.high(self.low(x.bfloat16()).float()).square().mean()

    engine, *_ = deepspeed.initialize(model=Mixed(), config=linear_config(zero_optimization={"stage": 2}))
    engine.backward(engine(torch.ones(2, 4)))
    engine.step()
    assert [unit.flat.dtype for unit in engine.optimizer.units] == [torch.bfloat16, torch.float32]
    assert {unit.master.dtype for unit in engine.optimizer.units} == {torch.float32}
    assert engine.module.codes.tolist() == [0, 1, 2]


@on_ranks(2)
def test_masters_keep_what_bf16_storage_rounds_away():
    model = nn.Linear(64, 1, bias=False)
    given = model.weight.detach().clone()
    dist.broadcast(given, 0)
    config = linear_config(bf16={"enabled": True}, zero_optimization={"stage": 1})
    deepspeed.initialize(model=model, config=config)
    from deepspeed.zero.access import safe_get_full_fp32_param

    assert torch.equal(safe_get_full_fp32_param(model.weight), given)
    assert torch.equal(model.weight, given.bfloat16())


@pytest.mark.parametrize(
    ("precision", "options", "master", "moments"),
    [
        ("bf16", {"bf16_master_weights_and_grads": True}, torch.bfloat16, torch.float32),
        (
            "bf16",
            {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True},
            torch.bfloat16,
            torch.bfloat16,
        ),
        (
            "fp16",
            {"fp16_master_weights_and_grads": True, "initial_scale_power": 2},
            torch.float16,
            torch.float32,
        ),
    ],
)
def test_low_precision_masters_when_asked(precision, options, master, moments):
    run_on_ranks(2, low_masters, precision, options, master, moments)


def low_masters(precision, options, master, moments):
    config = linear_config(
        zero_optimization={"stage": 1}, optimizer={"type": "AdamW", "params": {"lr": 0.01}}
    )
    config[precision] = {"enabled": True, **options}
    engine, *_ = deepspeed.initialize(model=nn.Linear(3, 2), config=config)
    train_one_step(engine, rows=2)
    unit = engine.optimizer.units[0]
    assert not unit.has_master
    assert unit.master.dtype == master
    assert {state["exp_avg"].dtype for state in engine.optimizer.state.values()} <= {moments}


@on_ranks(2)
def test_autocast_computes_low_and_keeps_weights():
    config = linear_config(
        torch_autocast={"enabled": True, "dtype": "bfloat16"}, zero_optimization={"stage": 2}
    )
    engine, *_ = deepspeed.initialize(model=nn.Linear(3, 2), config=config)
    output = engine(torch.ones(2, 3))
    assert output.dtype == torch.bfloat16
    engine.backward(output.float().mean())
    engine.step()
    assert engine.module.weight.dtype == torch.float32
    assert {unit.dtypes.reduce for unit in engine.optimizer.units} == {torch.bfloat16}


@pytest.mark.parametrize(
    "options",
    [
        {"prescale_gradients": True},
        {"gradient_predivide_factor": 4.0},
        {"communication_data_type": "fp32", "bf16": {"enabled": True}},
        {"data_types": {"grad_accum_dtype": "fp32"}},
    ],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.parametrize("stage", [0, 2])
def test_averaging_options_do_not_change_the_mean(options, stage):
    run_on_ranks(2, averaged, options, stage)


def averaged(options, stage):
    weights = []
    for more in ({}, options):
        torch.manual_seed(0)
        low = {"bf16": options["bf16"]} if "bf16" in options else {}
        config = linear_config(zero_optimization={"stage": stage}, **{**low, **more})
        engine, *_ = deepspeed.initialize(model=nn.Linear(3, 2), config=config)
        engine.backward(engine(torch.full((2, 3), 1.0 + dist.get_rank())).float().square().mean())
        engine.step()
        weights.append(engine.module.weight.detach().float())
    torch.testing.assert_close(weights[0], weights[1], rtol=8e-3 if "bf16" in options else 1e-6, atol=1e-6)


@on_ranks(2)
def test_gradients_are_divided_before_the_sum_in_the_dtype_that_is_sent():
    config = linear_config(
        zero_optimization={"stage": 1},
        fp16={"enabled": True, "loss_scale": 1.0},
        communication_data_type="fp32",
        gradient_predivide_factor=1024.0,
    )
    engine, *_ = deepspeed.initialize(model=nn.Linear(3, 2), config=config)
    before = engine.optimizer.units[0].master.clone()
    engine.backward(engine(torch.ones(2, 3).half()).float().sum() * 2e-6)  # fp16 has nothing below 6e-8
    engine.step()
    assert engine.get_global_grad_norm() > 0
    assert not torch.equal(engine.optimizer.units[0].master, before)


@on_ranks(2)
def test_sum_reduction_adds_over_ranks():
    config = linear_config(gradient_allreduce_op="sum", gradient_clipping=0.0, zero_optimization={"stage": 2})
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    engine, *_ = deepspeed.initialize(model=model, config=config)
    engine.backward(engine(torch.ones(2, 1)).mean())
    engine.step()
    assert model.weight.item() == pytest.approx(-0.2)


@on_ranks(2)
def test_weights_are_saved_whole_under_their_names():
    import tempfile

    from safetensors.torch import load_file

    engine, *_ = deepspeed.initialize(model=make_toy(tied=True), config=config_for(2, "bf16", 1, 0.0))
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    assert engine.save_16bit_model(folder[0])
    assert engine.save_16bit_model(folder[0], "model.safetensors")
    saved = torch.load(Path(folder[0]) / "pytorch_model.bin", weights_only=True)
    assert saved.keys() == engine.module.state_dict().keys()
    for name, value in engine.module.state_dict().items():
        assert torch.equal(saved[name], value)
    assert saved["embed.weight"].untyped_storage().nbytes() == saved["embed.weight"].nbytes
    tensors = load_file(Path(folder[0]) / "model.safetensors")
    assert "head.weight" not in tensors or "embed.weight" not in tensors
    assert sorted(path.name for path in Path(folder[0]).iterdir()) == [
        "model.safetensors",
        "pytorch_model.bin",
    ]
    dist.barrier()


@on_ranks(2)
def test_monitors_write_every_step_and_progress_is_printed():
    import csv
    import tempfile

    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    config = linear_config(
        csv_monitor={"enabled": True, "output_path": folder[0], "job_name": "job"},
        steps_per_print=2,
        wall_clock_breakdown=True,
        memory_breakdown=True,
    )
    engine, *_ = deepspeed.initialize(model=nn.Linear(3, 2), config=config)
    losses = [float(train_one_step(engine, rows=2).detach()) for _ in range(3)]
    engine.destroy()
    if dist.get_rank() == 0:
        files = {path.stem: list(csv.reader(path.open())) for path in Path(folder[0]).rglob("*.csv")}
        name = next(name for name in files if "train_loss" in name)
        assert [float(row[1]) for row in files[name][-3:]] == pytest.approx(losses, rel=1e-5)
        for event in ("lr", "grad_norm", "loss_scale", "samples_per_sec", "memory"):
            assert any(event in name for name in files), event


@on_ranks(2)
def test_the_loader_gives_each_rank_its_own_samples():
    config = {**linear_config(), "train_batch_size": 4}
    dataset = torch.arange(12).float().unsqueeze(1).expand(12, 3)
    engine, _, loader, _ = deepspeed.initialize(model=nn.Linear(3, 2), training_data=dataset, config=config)
    seen = [int(row[0]) for batch in loader for row in batch]
    gathered = [None, None]
    dist.all_gather_object(gathered, seen)
    assert sorted(gathered[0] + gathered[1]) == list(range(12))
    assert len(engine.deepspeed_io(dataset, batch_size=3, pin_memory=False)) == 2


@on_ranks(1)
def test_compile_keeps_training():
    engine, *_ = deepspeed.initialize(model=nn.Linear(3, 2), config=linear_config())
    engine.compile(backend="eager")
    assert engine.is_compiled
    train_one_step(engine)
    assert engine.was_step_applied()


@on_ranks(1)
def test_nothing_is_printed_on_a_quiet_run():
    import contextlib

    text = io.StringIO()
    with contextlib.redirect_stderr(text), contextlib.redirect_stdout(text):
        engine, *_ = deepspeed.initialize(model=nn.Linear(3, 2), config=linear_config())
        train_one_step(engine)
    assert text.getvalue() == ""


@on_ranks(1)
def test_a_module_given_to_the_engine_is_registered_in_place_of_a_number():
    engine, *_ = deepspeed.initialize(model=make_toy(), config=config_for(0, "fp32", 1, 0.0))
    engine.extra = 1
    engine.extra = 2
    assert engine.extra == 2
    engine.extra = nn.Linear(1, 1)
    assert "extra" in dict(engine.named_children())
    engine.extra = None
    assert engine.extra is None
