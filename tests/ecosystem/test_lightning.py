"""Lightning's Trainer and Fabric with DeepSpeedStrategy, which Lightning lets run on CUDA alone.

Only that refusal is replaced: an accelerator of CPU devices with numbers stands where the strategy looks for the
CUDA one. Everything else is Lightning's own, beside the same training with its DDP strategy.
"""

from __future__ import annotations

import inspect
import itertools
import json
import os
import warnings
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from harness import on_ranks, run_on_ranks
from torch import nn
from torch.utils.data import DataLoader

import deepspeed
from deepspeed.config import load_config
from deepspeed.zero import GatheredParameters

STAGES = ["deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3", "deepspeed_stage_3_offload"]
THEIRS = r"(lightning|torch|torchmetrics)\."
STRATEGIES = ("lightning.fabric.strategies.deepspeed", "lightning.pytorch.strategies.deepspeed")


@contextmanager
def cpu_instead_of_cuda():
    """Let the strategies take CPU devices; give an accelerator that has them."""
    from lightning.fabric.accelerators import CPUAccelerator
    from lightning.pytorch.accelerators import CPUAccelerator as TrainersCPU

    def numbered(devices):
        return [torch.device("cpu", index) for index in range(devices)]

    fabrics = type("NumberedCPU", (CPUAccelerator,), {"get_parallel_devices": staticmethod(numbered)})
    trainers = type("NumberedCPU", (TrainersCPU,), {"get_parallel_devices": staticmethod(numbered)})
    with (
        mock.patch(f"{STRATEGIES[0]}.CUDAAccelerator", fabrics),
        mock.patch(f"{STRATEGIES[1]}.CUDAAccelerator", trainers),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", module=THEIRS)
        yield fabrics(), trainers()


def network():
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))


def samples(batch_size=2):
    """Return a loader over this rank's own samples, always in the same order."""
    values = torch.arange(64.0).view(16, 4).sin() + dist.get_rank()
    return DataLoader(values, batch_size=batch_size)


def whole(module):
    """Return copies of all weights by name."""
    with GatheredParameters(module.parameters()):
        return {name: value.detach().clone() for name, value in module.state_dict().items()}


def same(ours, expected, tolerance=1e-5):
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            ours[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


# -- Fabric ---------------------------------------------------------------------------------------


def fabric_of(strategy, accelerator):
    import lightning

    fabric = lightning.Fabric(accelerator=accelerator, devices=2, strategy=strategy)
    fabric.launch()
    torch.manual_seed(3)
    with fabric.init_module():
        module = network()
    return fabric, *fabric.setup(module, torch.optim.Adam(module.parameters(), lr=0.01))


def fabric_steps(fabric, model, optimizer, count):
    losses = []
    for _, batch in zip(range(count), samples(), strict=False):
        loss = model(batch).square().mean()
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def fabric_trains():
    with cpu_instead_of_cuda() as (accelerator, _):
        fabric, model, optimizer = fabric_of("ddp", "cpu")
        losses = fabric_steps(fabric, model, optimizer, 5)
        for strategy in STAGES:
            fabric, ours, optimizer = fabric_of(strategy, accelerator)
            assert fabric_steps(fabric, ours, optimizer, 5) == pytest.approx(losses, rel=1e-5)
            same(whole(ours.module), whole(model.module))
            ours._forward_module.destroy()


def test_fabric_trains_as_with_ddp():
    run_on_ranks(2, fabric_trains)


def fabric_goes_on(folder):
    with cpu_instead_of_cuda() as (accelerator, _):
        for strategy in STAGES:
            fabric, model, optimizer = fabric_of(strategy, accelerator)
            fabric_steps(fabric, model, optimizer, 2)
            state = {"model": model, "optimizer": optimizer, "epoch": 7}
            path = os.path.join(folder, strategy)
            fabric.save(path, state)
            losses, weights = fabric_steps(fabric, model, optimizer, 3), whole(model.module)
            state["epoch"] = 0
            fabric.load(path, state)
            assert state["epoch"] == 7
            assert fabric_steps(fabric, model, optimizer, 3) == losses
            same(whole(model.module), weights, 0.0)
            model._forward_module.destroy()


def test_fabric_goes_on_from_its_checkpoint_bit_by_bit(tmp_path):
    run_on_ranks(2, fabric_goes_on, str(tmp_path))


def fabric_loads_one_file(folder):
    from lightning.fabric.strategies import DeepSpeedStrategy

    with cpu_instead_of_cuda() as (accelerator, _):
        strategy = DeepSpeedStrategy(stage=3, load_full_weights=True)
        fabric, model, optimizer = fabric_of(strategy, accelerator)
        torch.manual_seed(5)
        file, given = os.path.join(folder, "whole.pt"), network()
        if dist.get_rank() == 0:
            torch.save({"state_dict": given.state_dict()}, file)
        dist.barrier()
        strategy._restore_zero_state(model.module, torch.load(file))
        same(whole(model.module), given.state_dict(), 0.0)
        fabric_steps(fabric, model, optimizer, 1)  # and trains on from there
        model._forward_module.destroy()


def test_fabric_loads_whole_weights_under_stage_3(tmp_path):
    run_on_ranks(2, fabric_loads_one_file, str(tmp_path))


# -- Trainer --------------------------------------------------------------------------------------


def lit_module(lr=0.01):
    import lightning

    class Lit(lightning.LightningModule):
        def configure_model(self):  # under stage 3 it is born sharded
            if not hasattr(self, "net"):
                torch.manual_seed(3)
                self.net = network()

        def forward(self, batch):
            return self.net(batch)

        def training_step(self, batch, _):
            loss = self(batch).square().mean()
            self.log("loss", loss)
            return loss

        def validation_step(self, batch, _):
            self.log("validated", self(batch).square().mean(), sync_dist=True)

        def test_step(self, batch, index):
            self.log("tested", self(batch).square().mean(), sync_dist=True)

        def predict_step(self, batch, _):
            return self(batch)

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=lr, momentum=0.9)
            schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    return Lit()


def trainer_of(strategy, accelerator, folder, **options):
    import lightning

    return lightning.Trainer(
        accelerator="cpu" if strategy == "ddp" else accelerator,
        devices=2,
        strategy=strategy,
        default_root_dir=folder,
        use_distributed_sampler=False,  # samples() are this rank's own
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        **{"max_epochs": 1, "gradient_clip_val": 0.5, **options},
    )


def seen_by(trainer, module):
    """Fit, test and predict; return what came of each."""
    trainer.fit(module, samples(), samples())
    rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
    fitted = {name: float(value) for name, value in trainer.callback_metrics.items()}
    (tested,) = trainer.test(module, samples(), verbose=False)
    predicted = trainer.predict(module, samples())
    return fitted | tested, torch.cat(predicted), rates


def trainer_fits(folder):
    with cpu_instead_of_cuda() as (_, accelerator):
        numbers, predicted, rates = seen_by(trainer_of("ddp", accelerator, folder), lit_module())
        assert numbers["validated"] > 0
        for strategy in STAGES:
            ours = trainer_of(strategy, accelerator, os.path.join(folder, strategy))
            our_numbers, our_prediction, our_rates = seen_by(ours, lit_module())
            assert our_numbers == pytest.approx(numbers, rel=1e-4)
            torch.testing.assert_close(our_prediction, predicted, rtol=1e-4, atol=1e-6)
            assert our_rates == pytest.approx(rates)
            ours.strategy.model.destroy()


def test_trainer_fits_tests_and_predicts_as_with_ddp(tmp_path):
    run_on_ranks(2, trainer_fits, str(tmp_path))


def trainer_resumes(folder):
    from lightning.pytorch.utilities.deepspeed import convert_zero_checkpoint_to_fp32_state_dict

    with cpu_instead_of_cuda() as (_, accelerator):
        for strategy in STAGES:
            first = trainer_of(strategy, accelerator, os.path.join(folder, strategy), max_epochs=2)
            module = lit_module()
            first.fit(module, samples())
            weights = whole(module)
            path = os.path.join(folder, strategy, "middle.ckpt")
            half = trainer_of(strategy, accelerator, folder, max_epochs=1)
            half.fit(lit_module(), samples())
            half.save_checkpoint(path)
            half.strategy.model.destroy()
            again = trainer_of(strategy, accelerator, folder, max_epochs=2)
            resumed = lit_module()
            again.fit(resumed, samples(), ckpt_path=path)
            assert (again.global_step, again.current_epoch) == (first.global_step, 2)
            same(whole(resumed), weights, 0.0)
            again.save_checkpoint(path := os.path.join(folder, strategy, "end.ckpt"))
            if dist.get_rank() == 0:
                file = os.path.join(folder, strategy, "whole.pt")
                convert_zero_checkpoint_to_fp32_state_dict(path, file)
                same(torch.load(file)["state_dict"], weights, 0.0)
            for trainer in (first, again):
                trainer.strategy.model.destroy()


def test_trainer_resumes_bit_by_bit_and_its_checkpoint_becomes_one_file(tmp_path):
    run_on_ranks(2, trainer_resumes, str(tmp_path))


def trainer_accumulates(folder):
    with cpu_instead_of_cuda() as (_, accelerator):
        options = {"accumulate_grad_batches": 4, "gradient_clip_val": None}
        trainer = trainer_of("ddp", accelerator, folder, **options)
        plain = lit_module(0.01)
        trainer.fit(plain, samples())
        for strategy in ("deepspeed_stage_2", "deepspeed_stage_3"):
            ours = trainer_of(strategy, accelerator, os.path.join(folder, strategy), **options)
            module = lit_module(0.04)  # Lightning divides the loss by the steps, and so does the engine
            ours.fit(module, samples())
            assert ours.strategy.model.global_steps == trainer.global_step == 2
            same(whole(module), whole(plain))
            ours.strategy.model.destroy()


def test_trainer_accumulates(tmp_path):
    run_on_ranks(2, trainer_accumulates, str(tmp_path))


PRECISIONS = {"bf16-mixed": torch.bfloat16, "bf16-true": torch.bfloat16, "16-mixed": torch.float16}


def trainer_in_16_bit(folder):
    with cpu_instead_of_cuda() as (_, accelerator):
        plain = lit_module()
        trainer_of("ddp", accelerator, folder).fit(plain, samples())
        expected = whole(plain)
        for strategy, (precision, dtype) in itertools.product(STAGES[1:3], PRECISIONS.items()):
            ours = trainer_of(strategy, accelerator, os.path.join(folder, strategy), precision=precision)
            module = lit_module()
            ours.fit(module, samples())
            engine = ours.strategy.model
            assert (engine.bfloat16_enabled(), engine.fp16_enabled()) == (
                dtype is torch.bfloat16,
                dtype is torch.float16,
            )
            assert {param.dtype for param in module.parameters()} == {dtype}
            same({name: value.float() for name, value in whole(module).items()}, expected, 0.01)
            engine.destroy()


def test_trainer_in_16_bit_stays_near_fp32(tmp_path):
    run_on_ranks(2, trainer_in_16_bit, str(tmp_path))


def configured(folder):
    from lightning.pytorch.strategies import DeepSpeedStrategy

    config = {
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "optimizer": {"type": "SGD", "params": {"lr": 0.01, "momentum": 0.9}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 4, "warmup_max_lr": 0.1}},
        "train_micro_batch_size_per_gpu": 2,
    }
    path = Path(folder, f"config{dist.get_rank()}.json")
    path.write_text(json.dumps(config))
    with cpu_instead_of_cuda() as (_, accelerator):
        trainer = trainer_of(DeepSpeedStrategy(config=str(path)), accelerator, folder)
        trainer.fit(lit_module(), samples())
        engine = trainer.strategy.model
        assert engine.lr_scheduler is None  # Lightning drives the schedule
        assert trainer.lr_scheduler_configs[0].scheduler.last_batch_iteration > 0
        assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1)
        assert isinstance(trainer.optimizers[0].optimizer, torch.optim.SGD)
        engine.destroy()


def test_trainer_with_the_configurations_optimizer_and_schedule(tmp_path):
    run_on_ranks(2, configured, str(tmp_path))


# -- what the strategy does before and around training -------------------------------------------


@on_ranks(2)
def test_cpu_is_refused_by_lightning():
    from lightning.fabric import Fabric

    with pytest.raises(RuntimeError, match="only supported on CUDA GPUs"):
        Fabric(accelerator="cpu", devices=1, strategy="deepspeed_stage_2").launch()


@on_ranks(2)
def test_the_strategys_own_configurations_are_taken_without_a_word():
    from lightning.pytorch.strategies import DeepSpeedStrategy

    for stage, offload in itertools.product((1, 2, 3), (False, True)):
        strategy = DeepSpeedStrategy(
            stage=stage, offload_optimizer=offload, offload_parameters=offload and stage == 3
        )
        settings = load_config({**strategy.config, "train_micro_batch_size_per_gpu": 1}, world_size=2)
        assert settings.zero_optimization.stage == stage


@on_ranks(2)
def test_the_strategy_initializes_by_these_arguments():
    from lightning.fabric.strategies import DeepSpeedStrategy

    engine, optimizer = mock.Mock(), mock.Mock()
    with (
        cpu_instead_of_cuda() as (accelerator, _),
        mock.patch("deepspeed.initialize", return_value=(engine, optimizer, None, None)) as initialize,
    ):
        devices = [torch.device("cpu", index) for index in range(2)]
        strategy = DeepSpeedStrategy(accelerator=accelerator, parallel_devices=devices)
        module = network()
        given = torch.optim.SGD(module.parameters(), lr=0.1)
        assert strategy.setup_module_and_optimizers(module, [given]) == (engine, [optimizer], None)
    known = inspect.signature(deepspeed.initialize).parameters
    assert set(initialize.call_args.kwargs) <= set(known)
    assert initialize.call_args.kwargs["dist_init_required"] is False
