"""Wherever states are, training equals plain PyTorch on the whole batch."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from harness import run_on_ranks
from places import host_apart
from training import TOLERANCE, assert_equal_training, config_for, train_both


def parity(stage, precision, gas, clip, model, zero, folder):
    states = {"device": "nvme", "nvme_path": folder} if folder else {"device": "cpu"}
    if "ratio" in zero:
        states["ratio"] = zero.pop("ratio")
    config = config_for(stage, precision, gas, clip, offload_optimizer=states, **zero)
    engine, plain = train_both(config, precision=precision, model=model)
    assert_equal_training(engine, plain, TOLERANCE[precision])
    engine.destroy()


def on_disk(ranks, *options):
    with tempfile.TemporaryDirectory() as folder:
        run_on_ranks(ranks, parity, *options, folder)
        assert not list(Path(folder).iterdir())


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("gas", "clip"), [(1, 0.0), (3, 0.1)])
def test_optimizer_on_disk(ranks, stage, precision, gas, clip):
    on_disk(ranks, stage, precision, gas, clip, {}, {"sub_group_size": 16})


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(
    "model",
    [
        {"tied": True, "frozen": True},
        {"unused": True},
        {"checkpointing": "reentrant", "unused": True},
    ],
    ids=lambda model: "+".join(model),
)
def test_model_shapes_on_disk(stage, model):
    on_disk(2, stage, "bf16", 2, 0.5, model, {})


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_optimizer_in_host_memory(stage):
    run_on_ranks(2, parity, stage, "bf16", 2, 0.5, {}, {}, None)


def parity_apart(*options):
    with host_apart():
        parity(*options)


@pytest.mark.parametrize("stage", [2, 3])
def test_unused_parameters_on_a_host_apart(stage):
    run_on_ranks(2, parity_apart, stage, "bf16", 1, 0.5, {"unused": True, "frozen": True}, {}, None)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("precision", "gas"), [("fp32", 1), ("bf16", 3), ("fp16", 2)])
@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_optimizer_on_a_host_apart(ranks, stage, precision, gas, ratio):
    run_on_ranks(ranks, parity_apart, stage, precision, gas, 0.5, {}, {"ratio": ratio}, None)
