"""Ranks that do not do the same end soon, with an error on each that says who did what.

Paths of the data: "shards" that ranks of one host read alone, "rooms" of memory, "sockets" as between hosts.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from collectives import gathers_are_collectives
from harness import free_port, run_to_their_end
from torch import nn

import deepspeed
from deepspeed import comm
from deepspeed.comm import neighbours, standstill

SOON = 60.0  # seconds that a loaded machine gets
RANKS = 2


class TwoWays(nn.Module):
    """A stem, then one of two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, inputs: torch.Tensor, way: str = "left") -> torch.Tensor:
        return getattr(self, way)(self.stem(inputs)).sum()


def train(engine, *, way: str = "left", steps: int = 1) -> None:
    for _ in range(steps):
        engine.backward(engine(torch.ones(2, 8), way))
        engine.step()


def different_branches(engine, rank, folder):
    train(engine, way=("left", "right")[rank], steps=3)


def one_skips_backward(engine, rank, folder):
    loss = engine(torch.ones(2, 8))
    if rank == 0:
        engine.backward(loss)
    engine.step()
    train(engine, steps=2)


def one_raises(engine, rank, folder):
    if rank == 1:
        raise ValueError("bad sample")
    train(engine, steps=2)


def one_is_killed(engine, rank, folder):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    train(engine, steps=2)


def one_saves_alone(engine, rank, folder):
    if rank == 0:
        engine.save_16bit_model(folder)
    train(engine, steps=2)


def one_runs_out_of_data(engine, rank, folder):
    train(engine, steps=3 - rank)


def one_goes_to_a_barrier(engine, rank, folder):
    train(engine, steps=3 - rank)
    comm.barrier(label="end of the epoch")


def one_goes_to_torchs_barrier(engine, rank, folder):
    train(engine, steps=3 - rank)
    dist.barrier()


def one_gathers_objects(engine, rank, folder):
    train(engine, steps=3 - rank)
    dist.all_gather_object([None, None], rank)


def everybody_meets_late(engine, rank, folder):
    if rank == 1:
        time.sleep(7)  # it loads, evaluates, compiles
    dist.barrier()
    train(engine)


def run_ranks(case: Callable, folder: Path, *, stage: int, path: str) -> list[tuple[int, str]]:
    """Run a case on real processes; return each rank's exit code and what it printed."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(
        ["torch", "deepspeed", "torch._dynamo", "deepspeed.engine.initialize", "collectives"]
    )
    port = free_port()
    logs = [folder / f"{rank}.txt" for rank in range(RANKS)]
    ranks = [
        context.Process(target=_rank, args=(rank, port, case, stage, path, str(folder)))
        for rank in range(RANKS)
    ]
    return run_to_their_end(ranks, logs, SOON)


def _rank(rank: int, port: int, case: Callable, stage: int, path: str, folder: str) -> None:
    with open(f"{folder}/{rank}.txt", "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    sys.stderr.reconfigure(line_buffering=True)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    torch.manual_seed(0)
    if path == "sockets":
        neighbours._listen = lambda size: None
        standstill.PAUSE = standstill.LONG
    with nullcontext() if path == "shards" else gathers_are_collectives():
        engine, *_ = deepspeed.initialize(
            model=TwoWays(),
            config={
                "train_micro_batch_size_per_gpu": 2,
                "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
                "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            },
        )
        case(engine, rank, folder)


WAYS = pytest.mark.parametrize(("stage", "path"), [(2, "rooms"), (3, "shards"), (3, "rooms")])


@WAYS
@pytest.mark.parametrize(
    ("case", "said"),
    [
        (one_skips_backward, ("backward at", "rank 1 is in barrier: step without gradients (step at")),
        (one_saves_alone, ("rank 0 is in", "save_16bit_model", "rank 1 is in")),
        (
            one_goes_to_a_barrier,
            ("rank 0 is in", "rank 1 is in barrier: end of the epoch (barrier at test_ranks"),
        ),
    ],
    ids=["skip-backward", "save-alone", "barrier"],
)
def test_another_call_on_one_rank_is_an_error_on_both_that_names_both(case, said, stage, path, tmp_path):
    ends = []
    for code, text in run_ranks(case, tmp_path, stage=stage, path=path):
        assert code == 1
        ends.append(text.strip().splitlines()[-1])
        assert ends[-1].startswith("deepspeed.errors.CommunicationError: ranks disagree about call")
        assert "rank 0 is in" in ends[-1]
        assert "rank 1 is in" in ends[-1]
    # one that is told late knows the other's call, but not from where it was made
    assert all(any(part in last for last in ends) for part in said)


@WAYS
@pytest.mark.parametrize(
    ("case", "expected"),
    [(one_raises, 1), (one_is_killed, -signal.SIGKILL), (one_runs_out_of_data, 0)],
    ids=["raise", "kill", "out-of-data"],
)
def test_a_rank_that_ends_is_named_by_the_one_that_waits_for_it(case, expected, stage, path, tmp_path):
    (code, text), (other, _) = run_ranks(case, tmp_path, stage=stage, path=path)
    assert other == expected
    assert code == 1
    assert "CommunicationError: rank 1 ended while rank 0 waited for it in" in text
    assert " at test_ranks_disagree.py:" in text
    assert "stem" in text or "left" in text or "right" in text


@pytest.mark.parametrize("stage", [2, 3])
def test_ranks_that_read_each_others_shards_may_take_different_branches(stage, tmp_path):
    assert [code for code, _ in run_ranks(different_branches, tmp_path, stage=stage, path="shards")] == [0, 0]


@pytest.mark.parametrize("path", ["rooms", "sockets"])
def test_different_branches_are_named_where_gathers_are_collectives(path, tmp_path):
    for code, text in run_ranks(different_branches, tmp_path, stage=3, path=path):
        assert code == 1
        assert "rank 0 is in all_gather_single of 64 x float32: left (forward at test_ranks" in text
        assert "rank 1 is in all_gather_single of 64 x float32: right (forward at test_ranks" in text


@pytest.mark.parametrize(
    ("case", "said"),
    [(one_raises, "another rank ended"), (one_saves_alone, "(save_16bit_model at test_ranks_disagree.py")],
    ids=["raise", "save-alone"],
)
def test_ranks_that_meet_over_sockets_say_as_much(case, said, tmp_path):
    (code, text), (other, _) = run_ranks(case, tmp_path, stage=3, path="sockets")
    assert (code, other) == (1, 1)
    assert said in text
    assert "all_gather_single of 64 x float32: stem (forward at test_ranks_disagree.py" in text


@WAYS
@pytest.mark.parametrize(
    "case", [one_goes_to_torchs_barrier, one_gathers_objects], ids=["barrier", "objects"]
)
def test_ranks_that_wait_for_each_other_in_other_ways_say_so(case, stage, path, tmp_path):
    call = (
        "torch.distributed.barrier (barrier"
        if "barrier" in case.__name__
        else "torch.distributed.all_gather_object ("
    )
    for code, text in run_ranks(case, tmp_path, stage=stage, path=path):
        assert code == 1
        assert "CommunicationError: ranks wait for each other: rank 0 is in" in text
        assert f"rank 1 is in {call}" in text


def test_a_slow_rank_is_waited_for(tmp_path):
    ends = run_ranks(everybody_meets_late, tmp_path, stage=3, path="shards")
    assert [code for code, _ in ends] == [0, 0]
