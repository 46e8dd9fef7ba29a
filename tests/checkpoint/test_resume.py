"""A run that was stopped goes on as if it had not been, wherever it is loaded."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from checkpoint_runs import compare, draw, everything, make_engine, train
from harness import run_on_ranks

PLACES = {
    "0": {"stage": 0},
    "1-bf16": {"stage": 1, "precision": "bf16"},
    "2": {"stage": 2},
    "2-fp16": {"stage": 2, "precision": "fp16"},
    "3": {"stage": 3},
    "3-bf16": {"stage": 3, "precision": "bf16"},
    "3-bf16-nvme": {"stage": 3, "precision": "bf16", "tier": True},
    "3-params-nvme": {"stage": 3, "precision": "bf16", "tier": True, "params": True},
    "1-nvme": {"stage": 1, "tier": True},
}


def engine_at(place, tier, **options):
    place = dict(PLACES[place])
    if place.pop("tier", False):
        place["tier"] = tier
    return make_engine(**place, **options)


def stop_and_go_on(place, folder, tier):
    first = engine_at(place, tier)
    train(first, range(2))
    assert first.save_checkpoint(folder)
    numbers = draw()
    expected = train(first, range(2, 4))
    state, rates, scale = everything(first), first.get_lr(), first.loss_scale()
    first.destroy()
    second = engine_at(place, tier, seed=7)
    path, client = second.load_checkpoint(folder)
    assert (path, client) == (str(Path(folder) / "global_step2"), {})
    assert draw() == numbers
    assert train(second, range(2, 4)) == expected
    compare(everything(second), state)
    assert (second.global_steps, second.get_lr(), second.loss_scale()) == (4, rates, scale)
    second.destroy()


@pytest.mark.parametrize("place", PLACES)
def test_resuming_equals_not_stopping_to_the_bit(place):
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as tier:
        run_on_ranks(2, stop_and_go_on, place, folder, tier)


def save(place, folder, tier):
    engine = engine_at(place, tier)
    train(engine, range(2), ranks=1)
    engine.save_checkpoint(folder)
    state = everything(engine)
    train(engine, range(2, 4), ranks=1)
    if dist.get_rank() == 0:
        torch.save((state, everything(engine)), Path(folder) / "expected.pt")
    else:
        everything(engine)
    engine.destroy()


def load(place, folder, tier, exact):
    engine = engine_at(place, tier, seed=7)
    engine.load_checkpoint(folder)
    now, later = torch.load(Path(folder) / "expected.pt", weights_only=True)
    kinds = ("master", "exp_avg")
    compare(only(everything(engine), kinds), only(now, kinds))
    train(engine, range(2, 4), ranks=1)
    close = {"rtol": 1e-4, "atol": 1e-5} if exact else {"rtol": 5e-2, "atol": 2e-2}
    compare(only(everything(engine), kinds), only(later, kinds), **close)
    engine.destroy()


def only(state, kinds):
    return {name: value for name, value in state.items() if name.startswith(kinds)}


PAIRS = [
    (("0", 1), ("3", 2)),
    (("3", 2), ("0", 1)),
    (("2", 2), ("1-nvme", 3)),
    (("3", 3), ("2", 2)),
    (("3-bf16", 2), ("2-fp16", 1)),
    (("1-bf16", 3), ("3-bf16-nvme", 2)),
    (("3-bf16-nvme", 2), ("2", 1)),
    (("2-fp16", 1), ("3", 3)),
]


@pytest.mark.parametrize(("source", "target"), PAIRS, ids=str)
def test_a_checkpoint_loads_at_another_world_size_stage_precision_and_tier(source, target):
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as tier:
        run_on_ranks(source[1], save, source[0], folder, tier)
        exact = all("16" not in place for place, _ in (source, target))
        run_on_ranks(target[1], load, target[0], folder, tier, exact)
