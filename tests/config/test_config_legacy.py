"""Old names work and are reported once."""

import pytest

from deepspeed.config import load_config
from deepspeed.config.tree import lookup

ZERO = "zero_optimization"


def load(**tree):
    return load_config({"train_batch_size": 8, **tree}, refuse_unbuilt=False)


@pytest.mark.parametrize(
    ("tree", "path", "value", "old"),
    [
        ({"bfloat16": {"enabled": True}}, "bf16.enabled", True, "bfloat16"),
        ({ZERO: True}, f"{ZERO}.stage", 1, ZERO),
        ({ZERO: False}, f"{ZERO}.stage", 0, ZERO),
        ({ZERO: True, "allgather_size": 1e6}, f"{ZERO}.allgather_bucket_size", 10**6, ZERO),
        ({ZERO: {"cpu_offload": True}}, f"{ZERO}.offload_optimizer.device", "cpu", "cpu_offload"),
        (
            {ZERO: {"stage": 3, "cpu_offload_param": True}},
            f"{ZERO}.offload_param.device",
            "cpu",
            "cpu_offload_param",
        ),
        (
            {ZERO: {"stage3_gather_fp16_weights_on_model_save": True}},
            f"{ZERO}.stage3_gather_16bit_weights_on_model_save",
            True,
            "stage3_gather_fp16_weights_on_model_save",
        ),
        (
            {ZERO: {"gather_fp16_weights_on_model_save": True}},
            f"{ZERO}.stage3_gather_16bit_weights_on_model_save",
            True,
            "gather_fp16_weights_on_model_save",
        ),
    ],
)
def test_an_old_name_is_mapped_with_one_warning(tree, path, value, old, log):
    for _ in range(2):
        config = load(**tree)
    assert lookup(config, path) == value
    assert len(log) == 1
    assert old in log[0]
    assert config.source_of(path) != "default"


def test_today_s_name_wins_over_the_old_one(log):
    config = load(bf16={"enabled": False}, bfloat16={"enabled": True})
    assert not config.bf16.enabled
    assert log == ["bfloat16 is ignored: bf16 is given too"]


def test_an_offload_that_is_off_maps_to_nothing(log):
    config = load(zero_optimization={"cpu_offload": False, "cpu_offload_param": None})
    assert config.zero_optimization.offload_optimizer is None
    assert log == []
