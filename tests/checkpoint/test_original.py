"""A checkpoint that the original DeepSpeed wrote goes on here; the original's own numbers are the reference."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from checkpoint_runs import everything
from harness import run_on_ranks
from original_cases import (
    CASES,
    MORE,
    STEPS,
    case_config,
    case_groups,
    case_model,
    case_optimizer,
    words_loss,
)

import deepspeed

FOLDER = Path(__file__).parent / "original"
LATER = {"fp32": 2e-6, "bf16": 4e-3, "fp16": 1e-3}


def make_engine(case, **changes):
    """Make an engine of a case with other weights; `changes` are of the place it is loaded at."""
    model = case_model(case, seed=7)
    if case.get("left_out"):
        model.inner = case_model(case).inner
    optimizer = case_optimizer(case, model)
    return deepspeed.initialize(
        model=model,
        config=case_config({**case, **changes}),
        optimizer=optimizer,
        model_parameters=None if optimizer is not None else case_groups(case, model),
    )[0]


def truth_of(name):
    return torch.load(FOLDER / name / "truth.pt", weights_only=True)


def same_values(engine, expected, **tolerance):
    """Compare masters and states, and the weights that come from them."""
    state = everything(engine, keys=expected.get("state", ()))
    for name, master in expected["master"].items():
        torch.testing.assert_close(state[f"master {name}"], master, msg=name, **tolerance)
        torch.testing.assert_close(state[name], master.to(state[name].dtype), msg=name, **tolerance)
    for key, values in expected.get("state", {}).items():
        for name, value in values.items():
            torch.testing.assert_close(state[f"{key} {name}"], value, msg=f"{key} {name}", **tolerance)


def frozen_values(engine, case):
    """Compare frozen weights with those that the saved run had."""
    state = everything(engine)
    for name, param in case_model(case).named_parameters():
        if not param.requires_grad:
            torch.testing.assert_close(state[name], param.detach().to(state[name].dtype), msg=name)


def go_on(name):
    case, truth = CASES[name], truth_of(name)
    engine = make_engine(case)
    path, client = engine.load_checkpoint(FOLDER / name)
    assert path == str(FOLDER / name / "global_step2")
    assert client["epoch"] == 3
    assert client["args"] == argparse.Namespace(lr=0.1)
    assert client["seen"].tolist() == [0, 1, 2]
    now, later = truth["now"], truth["later"]
    same_values(engine, now, rtol=0, atol=0)
    frozen_values(engine, case)
    assert engine.get_lr() == now["lr"]
    assert [engine.global_steps, engine.global_samples, engine.skipped_steps] == now["counters"]
    if case.get("precision") == "fp16":
        assert engine.loss_scale() == (now["scale"] or 1)
    for step, expected in enumerate(truth["losses"], STEPS):
        loss = words_loss(engine, step, dist.get_rank())
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        near = LATER[case.get("precision", "fp32")]
        assert float(mean) / dist.get_world_size() == pytest.approx(expected, rel=near)
    near = LATER[case.get("precision", "fp32")]
    same_values(engine, later, rtol=near, atol=near)
    assert engine.get_lr() == pytest.approx(later["lr"])
    assert engine.global_steps == STEPS + MORE
    if case.get("precision") == "fp16":
        assert engine.loss_scale() == (later["scale"] or 1)
    engine.destroy()


@pytest.mark.parametrize("name", CASES)
def test_a_run_of_the_original_goes_on_as_it_would_have_there(name):
    run_on_ranks(CASES[name].get("ranks", 2), go_on, name)


def go_elsewhere(name, changes):
    engine = make_engine(CASES[name], **changes)
    engine.load_checkpoint(FOLDER / name)
    same_values(engine, truth_of(name)["now"], rtol=0, atol=0)
    if changes.get("precision") == "fp16":
        assert engine.loss_scale() == 2**8, "there was none to go on with"
    engine.destroy()


@pytest.mark.parametrize(
    ("name", "ranks", "changes"),
    [
        ("stage0-fp16", 3, {"stage": 3}),
        ("stage1-bf16", 1, {"stage": 0, "precision": "fp32"}),
        ("stage2-bf16-3ranks", 2, {"stage": 3, "precision": "fp16"}),
        ("stage3-fp32", 3, {"stage": 2, "precision": "bf16"}),
        ("stage3-bf16-3ranks", 1, {"stage": 1}),
    ],
)
def test_it_loads_at_another_world_size_stage_and_precision(name, ranks, changes):
    run_on_ranks(ranks, go_elsewhere, name, changes)
