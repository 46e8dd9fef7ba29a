"""What OpenRLHF, axolotl, ms-swift, open-instruct and older scripts do to an engine works and changes no result."""

from __future__ import annotations

import argparse
import functools
import inspect
import json
from importlib import metadata

import pytest
import torch
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum, OffloadStateTypeEnum
from harness import run_on_ranks
from packaging.version import Version
from torch import nn
from transformers import get_scheduler

import deepspeed
from deepspeed.checkpoint.torch_files import TorchCheckpointEngine

AUTO = dict.fromkeys(
    (
        "sub_group_size",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
        "stage3_param_persistence_threshold",
        "stage3_prefetch_bucket_size",
        "reduce_bucket_size",
    ),
    "auto",
)


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))


def config(stage, zero=None, **keys):
    return {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage, **(zero or {})},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        **keys,
    }


def train(engine, steps=range(3)):
    losses = []
    for step in steps:
        inputs = torch.randn(2, 8, generator=torch.Generator().manual_seed(step))
        loss = engine(inputs.to(next(engine.module.parameters()).dtype)).float().pow(2).mean()
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    return losses


def usual(stage, **options):
    engine, *_ = deepspeed.initialize(model=net(), config=config(stage, **options))
    losses = train(engine)
    engine.destroy()
    return losses


def openrlhf():
    keys = {
        "bf16": {"enabled": True},
        "steps_per_print": 100,
        "data_types": {"grad_accum_dtype": "fp32"},
        "checkpoint": {"load_universal": False},
        "compile": {"deepcompile": False},
        "tensor_parallel": {"autotp_size": 1},
    }
    zero = {
        **AUTO,
        "offload_optimizer": {"device": "none", "pin_memory": True},
        "zero_hpz_partition_size": 1,
        "zero_quantized_weights": False,
        "zero_quantized_gradients": False,
    }
    engine, _, _, scheduler = deepspeed.initialize(
        model=net(),
        optimizer=None,
        model_parameters=None,
        lr_scheduler=functools.partial(get_scheduler, "constant"),
        config=config(3, zero, **keys),
        args={"local_rank": 0},
        dist_init_required=True,
    )
    assert scheduler is engine.lr_scheduler
    losses = train(engine, [0, 1])
    kinds = OffloadStateTypeEnum
    engine.optimizer.offload_states(
        include=[kinds.optim_states, kinds.contiguous_grad_buffer, kinds.hp_params],
        device=OffloadDeviceEnum.cpu,
        pin_memory=True,
        non_blocking=True,
    )
    engine.reload_states(non_blocking=True)
    engine.empty_partition_cache()
    losses += train(engine, [2])
    assert losses == usual(3, bf16={"enabled": True})
    assert engine.config["zero_optimization"]["stage"] == engine.zero_optimization_stage() == 3
    engine.destroy()


def swift():
    engine, *_ = deepspeed.initialize(model=net(), config=config(3))
    called = []
    handle = engine.module.register_forward_pre_hook(lambda module, inputs: called.append(1))
    engine.module._forward_pre_hooks.move_to_end(handle.id, last=False)
    losses = train(engine, [0, 1])
    for param in engine.module.parameters():
        param.ds_tensor.data = param.ds_tensor.data.to("cpu", copy=True)  # away to the host and back
    losses += train(engine, [2])
    assert called
    assert losses == usual(3)
    whole = engine._zero3_consolidated_16bit_state_dict
    assert "exclude_frozen_parameters" in inspect.signature(whole).parameters
    engine._zero3_consolidated_16bit_state_dict = lambda *args, **kwargs: {"x": whole(*args, **kwargs)}
    assert "x" in engine._zero3_consolidated_16bit_state_dict()
    engine.destroy()


def axolotl(stage):
    zero = {
        "gather_16bit_weights_on_model_save": True,
        "max_live_parameters": 0,
        "max_reuse_distance": 0,
        "sub_group_size": 0,
    }
    keys = {
        "fp16": {"enabled": "auto", "auto_cast": False, "initial_scale_power": 32},
        "compile": {"disable": False, "backend": "inductor"},
        "gradient_clipping": "auto",
        "train_batch_size": "auto",
    }
    engine, *_ = deepspeed.initialize(model=net(), config=config(stage, zero, **keys))
    assert engine.zero_gather_16bit_weights_on_model_save()
    assert all(hasattr(p, "ds_id") or hasattr(p, "param_idx_in_group") for p in engine.module.parameters())
    assert train(engine) == usual(stage)
    engine.destroy()


class InTiles(torch.autograd.Function):
    """Compute a module in tiles, as axolotl's TiledMLP does: gradients are whole with the last tile only."""

    @staticmethod
    def forward(ctx, module, inputs, tiles):
        ctx.module, ctx.tiles = module, tiles
        ctx.save_for_backward(inputs)
        return torch.cat([module(tile) for tile in inputs.chunk(tiles)])

    @staticmethod
    def backward(ctx, grad):
        inputs = ctx.saved_tensors[0].detach()
        grads = []
        parts = zip(inputs.chunk(ctx.tiles), grad.chunk(ctx.tiles), strict=True)
        for number, (tile, tile_grad) in enumerate(parts):
            for param in ctx.module.parameters():
                param.ds_grad_is_ready = number == ctx.tiles - 1
            tile.requires_grad_()
            with torch.enable_grad():
                out = ctx.module(tile)
            torch.autograd.backward(out, tile_grad)
            grads.append(tile.grad)
        return None, torch.cat(grads), None


class Tiled(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, inputs):
        return InTiles.apply(self.module, inputs, 2)


def tiled(stage):
    model = net()
    engine, *_ = deepspeed.initialize(
        model=nn.Sequential(model[0], model[1], Tiled(model[2])), config=config(stage)
    )
    assert train(engine) == pytest.approx(usual(stage), rel=1e-6)
    engine.destroy()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gradients_that_are_not_ready_wait_for_the_last_tile(stage):
    run_on_ranks(1, tiled, stage)


def open_instruct():
    engine, *_ = deepspeed.initialize(model=net(), config=config(3))
    losses = train(engine, [0, 1])
    engine.mpu, before = None, engine.mpu
    engine.mpu = before
    offload = engine.optimizer.parameter_offload
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        for hook in (*offload.forward_hooks, *offload.backward_hooks):
            hook.remove()
        offload.forward_hooks, offload.backward_hooks = [], []
        with torch.no_grad():
            engine.module(torch.zeros(2, 8))
        offload.setup_zero_stage3_hooks()
    losses += train(engine, [2])
    assert losses == usual(3)
    engine.destroy()


@pytest.mark.parametrize("habits", [openrlhf, swift, open_instruct], ids=lambda habits: habits.__name__)
def test_what_a_trainer_does_leaves_training_as_it_is(habits):
    run_on_ranks(1, habits)


@pytest.mark.parametrize("stage", [2, 3])
def test_axolotl_s_spellings_are_understood(stage):
    run_on_ranks(1, axolotl, stage)


def examples_of_deepspeed():
    """DeepSpeed-Chat counts its epochs with the engine's timer, as many scripts made after it do."""
    engine, *_ = deepspeed.initialize(model=net(), config=config(2, gradient_accumulation_steps=2))
    for epoch in range(2):
        engine.train()
        train(engine, range(4))
        engine.eval()
        engine(torch.zeros(2, 8))
        engine.tput_timer.update_epoch_count()
        assert engine.tput_timer.epoch_count == epoch + 1
    assert not engine.tput_timer.started
    assert engine.tput_timer.global_step_count == engine.global_steps == 4
    assert engine.tput_timer.avg_samples_per_sec() > 0
    assert engine.tput_timer.batch_size == 4
    engine.destroy()


def test_epochs_and_samples_per_second_are_counted_for_the_script():
    run_on_ranks(1, examples_of_deepspeed)


def masters_by_name(stage):
    engine, optimizer, _, _ = deepspeed.initialize(
        model=net(), config=config(stage, bf16={"enabled": True}, gradient_clipping=1.0)
    )
    name = "fp32_partitioned_groups_flat" if stage == 3 else "single_partition_of_fp32_groups"
    before = [part.clone() for part in getattr(optimizer, name)]
    assert sum(part.numel() for part in before) >= sum(param.numel() for param in engine.module.parameters())
    train(engine)
    for part, old in zip(getattr(optimizer, name), before, strict=True):
        assert part.dtype == torch.float32
        assert not torch.equal(part, old)
    engine.destroy()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_master_weights_are_found_by_their_names(stage):
    run_on_ranks(1, masters_by_name, stage)


def schedule_of_its_own():
    """Megatron-DeepSpeed's schedule counts samples."""

    class Counted:
        samples = 0

        def step(self, increment=1):
            self.samples += increment

        def state_dict(self):
            return {"samples": self.samples}

    engine, *_ = deepspeed.initialize(model=net(), lr_scheduler=Counted(), config=config(2))
    loss = engine(torch.randn(2, 8)).mean()
    engine.backward(loss)
    engine.step(lr_kwargs={"increment": 16})
    assert engine.lr_scheduler.samples == 16
    assert engine.was_step_applied()
    assert engine.random_ltd_enabled() is False  # which its loop asks in every step
    engine.destroy()


def test_arguments_of_step_reach_the_schedule():
    run_on_ranks(1, schedule_of_its_own)


def from_arguments(path):
    parser = deepspeed.add_config_arguments(argparse.ArgumentParser())
    args = parser.parse_args(["--deepspeed", "--deepspeed_config", str(path)])
    engine, *_ = deepspeed.initialize(args=args, model=net())
    assert engine.zero_optimization_stage() == 1
    engine.destroy()


def test_a_script_s_arguments_name_the_configuration(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config(1)))
    run_on_ranks(1, from_arguments, tmp_path / "config.json")


def test_a_patched_loader_is_that_of_single_files(tmp_path, monkeypatch):
    torch.save({"weights": torch.ones(3)}, tmp_path / "file.pt")
    engine = TorchCheckpointEngine()
    engine.save(engine.load(tmp_path / "file.pt"), tmp_path / "again.pt")
    assert torch.equal(engine.load(tmp_path / "again.pt", map_location="cpu")["weights"], torch.ones(3))
    monkeypatch.setattr(TorchCheckpointEngine, "load", lambda self, path, map_location=None: "theirs")
    assert engine.load("anything") == "theirs"


def test_versions_compare_as_scripts_do():
    assert deepspeed.version >= "0.16.4"  # as strings
    assert Version(deepspeed.__version__) >= Version("0.18.9")
    assert metadata.version("deepspeed") == deepspeed.__version__ == deepspeed.version
