"""Parameters on disk: training, evaluation and edits are what they are in memory."""

from __future__ import annotations

import gc
import tempfile
from contextlib import nullcontext
from pathlib import Path

import pytest
from collectives import gathers_are_collectives
from harness import run_on_ranks
from training import TOLERANCE, assert_equal_training, config_for, train_both


def in_folder(ranks, body, *options):
    """Run `body(folder, *options)` on ranks; nothing is left in the folder afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        run_on_ranks(ranks, in_it, body, folder, *options)
        assert not list(Path(folder).iterdir())


def in_it(body, folder, *options):
    body(folder, *options)
    gc.collect()


def on_disk(folder, **options):
    return {"device": "nvme", "nvme_path": folder, "max_in_cpu": 0, **options}


def parity(folder, precision, gas, model, *, states=False, max_in_cpu=0, collectives=False):
    zero = {"offload_param": on_disk(folder, max_in_cpu=max_in_cpu), "sub_group_size": 16}
    if states:
        zero["offload_optimizer"] = {"device": "nvme", "nvme_path": folder}
    config = config_for(3, precision, gas, 0.1, **zero)
    with gathers_are_collectives() if collectives else nullcontext():
        engine, plain = train_both(config, precision=precision, model=model)
        assert engine.memory_report().on_disk > 0
        assert_equal_training(engine, plain, TOLERANCE[precision])
        engine.destroy()


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize(("precision", "gas"), [("fp32", 1), ("bf16", 3), ("fp16", 2)])
def test_training_equals_plain_pytorch(ranks, precision, gas):
    in_folder(ranks, parity, precision, gas, {})
