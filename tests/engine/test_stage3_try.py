import pytest
from harness import run_on_ranks
from test_parity import parity

Z = {"stage3_param_persistence_threshold": 0}


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("gas", [1, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_it(ranks, gas, precision):
    run_on_ranks(ranks, parity, 3, precision, gas, 0.1, {}, Z)


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
@pytest.mark.parametrize(
    "zero",
    [
        {},
        {"stage3_max_live_parameters": 10},
        {"stage3_param_persistence_threshold": 40},
        {"zero_hpz_partition_size": 2},
        {"mics_shard_size": 2},
    ],
    ids=str,
)
def test_model_shapes(gas, model, zero):
    run_on_ranks(
        4 if len(zero) == 1 and "p" in str(zero) and ("hpz" in str(zero) or "mics" in str(zero)) else 2,
        parity,
        3,
        "fp32",
        gas,
        0.5,
        model,
        {**Z, **zero},
    )
