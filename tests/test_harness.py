"""The test harness keeps its promises."""

import os

import harness
import pytest
import torch
import torch.distributed as dist
from harness import on_ranks


@on_ranks(2)
def test_body_runs_on_every_rank():
    total = torch.ones(1) * (dist.get_rank() + 1)
    dist.all_reduce(total)
    assert total.item() == 3
    assert dist.get_world_size() == 2


def _fail_on_rank_one():
    if dist.get_rank() == 1:
        raise ValueError("only me")
    dist.barrier()


def test_failing_rank_reports_its_own_traceback():
    with pytest.raises(harness.RankFailure, match=r"rank 1[\s\S]*only me"):
        harness.run_on_ranks(2, _fail_on_rank_one)


def _die():
    if dist.get_rank() == 0:
        os._exit(7)
    dist.barrier()


def test_dead_rank_is_named_with_its_exit_code():
    with pytest.raises(harness.RankFailure, match=r"rank 0[\s\S]*exit code 7"):
        harness.run_on_ranks(2, _die)
