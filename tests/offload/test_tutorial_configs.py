"""Configurations of the offload tutorials train as they are, and as plain PyTorch does."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from reference import PlainTrainer
from tutorial_script import STEPS, loss_of, make_model

HERE = Path(__file__).resolve().parent
SCRIPT = HERE / "tutorial_script.py"
SAMPLES = HERE.parent / "config" / "samples"
LAUNCHER = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2"]
LAUNCHED = {1: [sys.executable, str(SCRIPT)], 2: [*LAUNCHER, str(SCRIPT), "--deepspeed"]}


def train(name: str, ranks: int, folder: Path) -> tuple[list[dict], str]:
    """Run the script as users do; return what each rank saw, and what was said."""
    arguments = ["--deepspeed_config", str(SAMPLES / name), "--out", str(folder)]
    if "auto" in name:
        arguments.append("--auto")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])}
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(variable, None)
    done = subprocess.run(
        [*LAUNCHED[ranks], *arguments], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt") for rank in range(ranks)], done.stderr


def train_plainly(results: list[dict], rate_of_step, **adamw) -> tuple[list[float], list[torch.Tensor]]:
    """Train on the same batches with plain PyTorch; return losses and weights."""
    make = partial(torch.optim.AdamW, lr=0.0, **adamw)
    plain = PlainTrainer(make_model(), make, storage=torch.float16, clip=1.0)
    losses = []
    for step, on_ranks in enumerate(zip(*(result["seen"] for result in results), strict=True)):
        plain.optimizer.param_groups[0]["lr"] = rate_of_step(step)
        losses.append(plain.step([batch for batch, _ in on_ranks], loss_of))
    return losses, list(plain.master.parameters())


def assert_trained_alike(results, losses, masters) -> None:
    """Losses are equal, and the weights took the same way, which at these rates is a short one."""
    for step, expected in enumerate(losses):
        here = sum(float(result["seen"][step][1]) for result in results) / len(results)
        assert here == pytest.approx(expected, rel=1e-3)
    starts = list(make_model().parameters())
    for ours, theirs, start in zip(results[0]["masters"], masters, starts, strict=True):
        way = (theirs - start).norm()
        assert way > 0
        assert (ours - theirs).norm() < 0.02 * way


def assert_saved_whole(folder: Path, results) -> None:
    saved = torch.load(folder / "model.bin")
    for weight, master in zip(saved.values(), results[0]["masters"], strict=True):
        assert torch.equal(weight, master.half())


def warmed_up(step: int) -> float:
    return 3e-5 * math.log(max(step, 1)) / math.log(500)


@pytest.mark.parametrize("ranks", [1, 2])
def test_zero3_offload_trains_as_it_is(ranks, tmp_path):
    results, said = train("zero3_offload.json", ranks, tmp_path)
    assert said == ""
    for result in results:
        assert (result["batch"], result["skipped"]) == ((4 * ranks, 4), 0)
        assert result["lr"] == pytest.approx(warmed_up(STEPS))
    losses, masters = train_plainly(results, warmed_up, betas=(0.8, 0.999), eps=1e-8, weight_decay=3e-7)
    assert_trained_alike(results, losses, masters)
    assert_saved_whole(tmp_path, results)


@pytest.mark.parametrize("ranks", [1, 2])
def test_zero3_offload_auto_trains_as_it_is_and_tells_what_auto_became(ranks, tmp_path):
    results, said = train("zero3_offload_auto.json", ranks, tmp_path)
    for became in (
        "optimizer.params.lr left out (the optimizer's own)",
        "zero_optimization.reduce_bucket_size = 4096 (model width 64)",
        "zero_optimization.stage3_prefetch_bucket_size = 3686 (model width 64)",
        "zero_optimization.stage3_param_persistence_threshold = 640 (model width 64)",
        f"train_batch_size = {4 * ranks} (batch size of the loader given as training_data)",
        "train_micro_batch_size_per_gpu = 4 (batch size of the loader given as training_data)",
        "is the old name of zero_optimization.stage3_gather_16bit_weights_on_model_save",
    ):
        assert said.count(became) == 1
    assert len(said.splitlines()) == 3
    for result in results:
        assert (result["batch"], result["skipped"], result["lr"]) == ((4 * ranks, 4), 0, 1e-3)
    losses, masters = train_plainly(results, lambda step: 1e-3, betas=(0.9, 0.95), weight_decay=0.01)
    assert_trained_alike(results, losses, masters)
    assert_saved_whole(tmp_path, results)
    assert results[0]["parameters"] == pytest.approx(sharded_above(640, ranks), rel=0.02)


def sharded_above(threshold: int, ranks: int) -> float:
    """Bytes of fp16 weights on a rank where larger ones are sharded."""
    sizes = [param.numel() for param in make_model().parameters()]
    return sum(2 * size / (ranks if size >= threshold else 1) for size in sizes)
