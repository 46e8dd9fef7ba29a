"""Communication that ends late, at random, and spoils its buffers until then changes no bit."""

from __future__ import annotations

import random
from contextlib import contextmanager

import pytest
import torch
from collectives import gathers_are_collectives
from harness import run_on_ranks
from torch import Tensor
from toys import make_toy, toy_batch, toy_loss

import deepspeed
from deepspeed import comm


class LateWork:
    """Completes when waited for; the output holds NaN until then."""

    def __init__(self, call, output: Tensor, source: Tensor | list[Tensor], log: list) -> None:
        self._log, self._result = log, torch.empty_like(output)
        self._output = output
        self._work = call(self._result, source)
        output.fill_(float("nan"))
        log.append(self)

    def wait(self, *_args) -> bool:
        self._work.wait()
        assert self._output.isnan().all(), "somebody wrote into a buffer in flight"
        self._output.copy_(self._result)
        self._log.remove(self)
        return True

    def is_completed(self) -> bool:
        return False


@contextmanager
def late_communication(seed: int):
    rng = random.Random(seed)
    calls = {name: getattr(comm, name) for name in ("start_all_gather", "start_reduce_scatter")}
    in_flight: list = []

    def late(name):
        def call(output, source, *args, **kwargs):
            inner = lambda out, given: calls[name](out, given, *args, **kwargs)  # noqa: E731
            if output.numel() == 0 or rng.random() < 0.2:  # done at once, sometimes
                return inner(output, source)
            if name == "start_all_gather":
                source = source.clone()  # it may be a part of what is spoiled
            return LateWork(inner, output, source, in_flight)

        return call

    for name in calls:
        setattr(comm, name, late(name))
    try:
        yield in_flight
    finally:
        for name, call in calls.items():
            setattr(comm, name, call)


def train(stage: int, precision: dict, model: dict, zero: dict) -> list[Tensor]:
    rank = torch.distributed.get_rank()
    engine, *_ = deepspeed.initialize(
        model=make_toy(**model),
        config={
            "train_micro_batch_size_per_gpu": 3,
            "gradient_accumulation_steps": 2,
            "gradient_clipping": 0.5,
            "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
            "zero_optimization": {
                "stage": stage,
                "overlap_comm": True,
                "stage3_param_persistence_threshold": 0,
                **zero,
            },
            **precision,
        },
    )
    for step in range(2):
        for micro in range(2):
            engine.backward(toy_loss(engine, toy_batch(step, micro, rank)))
            engine.step()
    engine.eval()
    with torch.no_grad():
        toy_loss(engine, toy_batch(9, 0, rank))
    state = [value.clone() for value in engine.module_state_dict().values()]
    engine.destroy()
    return state


def undisturbed_and_late(stage, seeds, zero):
    precision = {"bf16": {"enabled": True}} if seeds[0] % 2 else {}
    model = {
        "tied": True,
        "frozen": bool(seeds[0] % 3),
        "checkpointing": [None, "reentrant", "non_reentrant"][seeds[0] % 3],
    }
    with gathers_are_collectives():
        expected = train(stage, precision, model, zero)
        for seed in seeds:
            with late_communication(seed) as in_flight:
                got = train(stage, precision, model, zero)
                assert not in_flight, "somebody left a communication in flight"
            for one, other in zip(expected, got, strict=True):
                assert torch.equal(one, other)


@pytest.mark.parametrize(
    "zero",
    [
        {"stage3_max_reuse_distance": 0},
        {"stage3_max_reuse_distance": 10**9, "reduce_bucket_size": 60},
        {"stage3_max_live_parameters": 60, "stage3_prefetch_bucket_size": 200},
    ],
    ids=str,
)
@pytest.mark.parametrize("first", [0, 1, 2])
def test_late_and_spoiled_communication_changes_no_bit(first, zero):
    run_on_ranks(2, undisturbed_and_late, 3, range(first, 21, 3), zero)


@pytest.mark.parametrize("stage", [1, 2])
def test_below_stage_3(stage):
    run_on_ranks(2, undisturbed_and_late, stage, range(3), {})


def test_groups_smaller_than_the_world():
    run_on_ranks(4, undisturbed_and_late, 3, range(2), {"mics_shard_size": 2, "stage3_max_reuse_distance": 0})
    run_on_ranks(
        4,
        undisturbed_and_late,
        3,
        range(1, 3),
        {"zero_hpz_partition_size": 2, "stage3_max_reuse_distance": 0},
    )
