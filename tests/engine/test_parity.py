"""Every stage, precision, accumulation and model shape equals plain PyTorch on the whole batch."""

from __future__ import annotations

import pytest
from collectives import ranks_on_hosts
from harness import run_on_ranks
from training import TOLERANCE, assert_equal_training, config_for, train_both

from deepspeed.comm import shared


def parity(stage, precision, gas, clip, model, zero):
    engine, plain = train_both(
        config_for(stage, precision, gas, clip, **zero), precision=precision, model=model
    )
    assert_equal_training(engine, plain, TOLERANCE[precision])
    engine.destroy()


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("gas", "clip"), [(1, 0.0), (3, 0.1)])
def test_stage_precision_accumulation(ranks, stage, precision, gas, clip):
    run_on_ranks(ranks, parity, stage, precision, gas, clip, {}, {})


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("gas", [1, 2])
@pytest.mark.parametrize(
    "model",
    [
        {"tied": True},
        {"frozen": True},
        {"unused": True},
        {"checkpointing": "reentrant"},
        {"checkpointing": "non_reentrant", "frozen": True},
        {"tied": True, "unused": True, "checkpointing": "reentrant"},
    ],
    ids=lambda model: "+".join(model),
)
def test_model_shapes(stage, gas, model):
    run_on_ranks(2, parity, stage, "fp32", gas, 0.5, model, {})


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(
    "zero",
    [
        {"reduce_bucket_size": 1},
        {"reduce_bucket_size": 60, "overlap_comm": True},
        {"overlap_comm": False, "contiguous_gradients": False},
        {"round_robin_gradients": True, "reduce_scatter": False},
    ],
    ids=str,
)
def test_bucket_and_overlap_change_time_only(stage, zero):
    run_on_ranks(2, parity, stage, "fp32", 2, 0.5, {}, zero)


SHARDINGS = [
    {"stage3_param_persistence_threshold": 40},
    {"stage3_param_persistence_threshold": 40, "stage3_model_persistence_threshold": 20},
    {"stage3_max_live_parameters": 10},
    {"stage3_max_reuse_distance": 0},
    {"stage3_module_granularity_threshold": 1000},
    {"mics_shard_size": 2},
    {"zero_hpz_partition_size": 2},
]


@pytest.mark.parametrize("zero", SHARDINGS, ids=str)
@pytest.mark.parametrize(
    "model",
    [
        {"tied": True, "frozen": True, "checkpointing": "non_reentrant"},
        {"checkpointing": "reentrant", "unused": True},
    ],
    ids=lambda model: "+".join(model),
)
def test_what_stage_3_keeps_and_releases_changes_memory_only(model, zero):
    run_on_ranks(4, parity, 3, "bf16" if "frozen" in model else "fp32", 2, 0.5, model, zero)


def parity_over_hosts(*settings):
    small, shared.SMALL = shared.SMALL, 8  # the toys are small
    try:
        with ranks_on_hosts(2):
            parity(*settings)
    finally:
        shared.SMALL = small


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_ranks_of_two_hosts(stage, precision):
    run_on_ranks(4, parity_over_hosts, stage, precision, 2, 0.5, {"tied": True, "unused": True}, {})


@pytest.mark.parametrize("zero", SHARDINGS[2:], ids=str)
def test_what_stage_3_releases_over_two_hosts(zero):
    model = {"frozen": True, "checkpointing": "non_reentrant"}
    run_on_ranks(4, parity_over_hosts, 3, "bf16", 2, 0.5, model, zero)
