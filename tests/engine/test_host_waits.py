"""On a device the host runs ahead: a step reads one flag, where it may be skipped, and waits for nothing else."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor

import pytest


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[Executor]:
    """A process of its own, as the card takes a whole one."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        yield executor


def waits_of_two_steps(
    stage: int, precision: dict[str, dict[str, bool]], ranks: int, gas: int
) -> dict[str, int]:
    """Train on the card; return how often the host waited in the second and third step, by reason."""
    import torch
    from card import card, waits
    from torch import nn

    import deepspeed

    with card(ranks):
        with torch.device("card"):
            blocks = [nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64), nn.ReLU()) for _ in range(3)]
            model = nn.Sequential(nn.Linear(8, 64), *blocks)
        engine, *_ = deepspeed.initialize(
            model=model,
            config={
                "train_micro_batch_size_per_gpu": 2,
                "gradient_accumulation_steps": gas,
                "gradient_clipping": 1.0,
                "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
                "optimizer": {"type": "AdamW", "params": {"weight_decay": 0.1}},
                **precision,
            },
        )
        for step in range(3):
            if step == 1:
                waits.clear()
            for _ in range(gas):
                loss = engine(torch.randn(2, 8, device="card")).float().square().mean()
                engine.backward(loss)
                engine.step()
        assert engine.global_steps == 3
        engine.destroy()
    return dict(waits)


@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(
    ("precision", "flags"),
    [
        ({}, 0),
        ({"bf16": {"enabled": True}}, 1),
        ({"bf16": {"enabled": True, "check_grad_overflow": False}}, 0),
        ({"fp16": {"enabled": True}}, 1),
    ],
    ids=["fp32", "bf16", "bf16 unchecked", "fp16"],
)
def test_a_step_waits_for_one_flag_where_it_may_be_skipped(elsewhere, precision, flags, stage, ranks):
    waits = elsewhere.submit(waits_of_two_steps, stage, precision, ranks, 1).result()

    assert waits == ({"flag": 2 * flags} if flags else {})


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_accumulation_waits_for_no_more(elsewhere, stage):
    bf16 = {"bf16": {"enabled": True}}

    assert elsewhere.submit(waits_of_two_steps, stage, bf16, 4, 3).result() == {"flag": 2}
