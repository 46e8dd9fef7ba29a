"""Ranks of several hosts: through memory inside a host, through the network between them."""

import os
import signal
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from collectives import ranks_on_hosts
from harness import RankFailure, on_ranks, run_on_ranks

from deepspeed import comm
from deepspeed.comm import direct, links, neighbours, shared
from deepspeed.comm.hosts import GatherAcross, Hosts, ReduceAcross, hosts_of
from deepspeed.comm.neighbours import links_of
from deepspeed.comm.rooms import SWITCH
from deepspeed.errors import CommunicationError

LARGE = shared.SMALL + 5
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32]


def message(rank: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    return (torch.randn(numel, generator=generator) * 9).to(dtype)


def total(ranks: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    """The sum, host by host, of messages of pairs of ranks."""
    wide = torch.float32 if dtype.is_floating_point and dtype.itemsize < 4 else dtype
    parts = [message(rank, numel, dtype).to(wide) for rank in range(ranks)]
    pairs = [parts[at] + parts[at + 1] for at in range(0, ranks, 2)]
    return sum(pairs[1:], start=pairs[0]).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_ranks(4)
def test_reduce_scatter_and_all_gather_over_two_hosts(monkeypatch, dtype):
    rank = dist.get_rank()
    monkeypatch.setattr(Hosts, "save_traffic", lambda self, dtype: True)
    with ranks_on_hosts(2):
        assert links_of(None) is None
        for numel in (4, 20, 4 * LARGE):
            expected, chunk = total(4, numel, dtype), numel // 4
            output = torch.empty(chunk, dtype=dtype)
            mine = message(rank, numel, dtype)
            works = [comm.start_reduce_scatter(output, [mine[:3], mine[3:]]) for _ in range(3)]
            assert isinstance(works[0], ReduceAcross)
            for work in works:
                work.wait()
                assert work.is_completed()
            assert torch.equal(output, expected[rank * chunk : (rank + 1) * chunk])
            whole = torch.empty(numel, dtype=dtype)
            work = comm.start_all_gather(whole, output)
            assert isinstance(work, GatherAcross)
            work.wait()
            assert work.is_completed()
            assert torch.equal(whole, expected)
            comm.reduce_scatter_single(output, mine)
            assert torch.equal(output, expected[rank * chunk : (rank + 1) * chunk])
            pieces = [torch.empty_like(output) for _ in range(4)]
            comm.all_gather(pieces, output)
            assert torch.equal(torch.cat(pieces), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("numel", [7, LARGE, 4 * LARGE])
@on_ranks(4)
def test_all_reduce_over_two_hosts(monkeypatch, numel, dtype):
    monkeypatch.setattr(Hosts, "save_traffic", lambda self, dtype: True)
    tensor = message(dist.get_rank(), numel, dtype)
    with ranks_on_hosts(2):
        started = tensor.clone()
        first = comm.start_all_reduce(started)
        comm.all_reduce(tensor)
        first.wait()
    expected = total(4, numel, dtype)
    tolerance = 0.05 * (numel <= shared.SMALL)  # gloo's, which rounds every sum of two
    torch.testing.assert_close(tensor, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(started, tensor, rtol=0, atol=0)


@pytest.mark.parametrize("op", ["AVG", "MIN", "MAX"])
@on_ranks(4)
def test_other_reductions_over_two_hosts(op):
    parts = torch.stack([message(rank, LARGE, torch.float32) for rank in range(4)])
    expected = {"AVG": parts.mean(0), "MIN": parts.amin(0), "MAX": parts.amax(0)}[op]
    tensor = parts[dist.get_rank()].clone()
    with ranks_on_hosts(2):
        comm.all_reduce(tensor, getattr(dist.ReduceOp, op))
    torch.testing.assert_close(tensor, expected)


@on_ranks(4)
def test_16_bit_sums_of_two_ranks_are_no_smaller_and_go_as_they_are():
    output, mine = torch.empty(100), torch.ones(400)
    with ranks_on_hosts(2):
        assert isinstance(comm.start_reduce_scatter(output, [mine]), ReduceAcross)
        narrow = comm.start_reduce_scatter(output.bfloat16(), [mine])
        assert not isinstance(narrow, ReduceAcross)
        narrow.wait()


@on_ranks(4)
def test_an_average_of_integers_takes_the_network_alone():
    tensor, output = torch.tensor([1, 2, 4, 4]) * (dist.get_rank() + 1), torch.empty(1, dtype=torch.int64)
    with ranks_on_hosts(2):
        comm.reduce_scatter_single(output, tensor, dist.ReduceOp.AVG)
    assert output.item() == [2, 5, 10, 10][dist.get_rank()]  # 10 x (1, 2, 4, 4) / 4, cut


@on_ranks(4)
def test_ranks_that_are_not_next_to_each_other_share_a_host(monkeypatch):
    rank = dist.get_rank()
    with ranks_on_hosts(2):
        monkeypatch.setattr(neighbours, "_host", lambda: f"host {rank % 2}")
        found = hosts_of(None)
        assert found is not None
        assert found.columns == [[0, 1], [2, 3]]
        assert found.links.names == [rank % 2, rank % 2 + 2]
        output = torch.empty(4, dtype=torch.int64)
        comm.all_gather_single(output, torch.tensor([rank]))
        assert output.tolist() == [0, 1, 2, 3]
        one = torch.empty(1, dtype=torch.int64)
        comm.reduce_scatter_single(one, torch.arange(4) * (rank + 1))
        assert one.item() == 10 * rank


@on_ranks(4)
def test_an_asynchronous_gather_may_be_waited_for_in_any_order():
    rank = dist.get_rank()
    with ranks_on_hosts(2):
        outputs = [torch.empty(4) for _ in range(2)]
        works = [comm.all_gather_single(one, torch.ones(1) * rank, async_op=True) for one in outputs]
        for work in works if rank % 2 else reversed(works):
            work.wait()
    assert all(one.tolist() == [0, 1, 2, 3] for one in outputs)


@on_ranks(3)
def test_hosts_of_different_sizes_take_the_network_alone():
    with ranks_on_hosts(2):
        assert hosts_of(None) is None
        assert links_of(None) is None
        tensor = torch.ones(LARGE)
        comm.all_reduce(tensor)
        assert tensor[-1] == 3


@on_ranks(4)
def test_the_switch_on_one_rank_counts_for_all(monkeypatch):
    if dist.get_rank() == 3:
        monkeypatch.setenv(SWITCH, "0")
    with ranks_on_hosts(2):
        assert hosts_of(None) is None
        output = torch.empty(4)
        comm.start_all_gather(output, torch.ones(1)).wait()
        assert output.sum() == 4


@on_ranks(4)
def test_a_host_sends_its_sum_once(monkeypatch):
    """What each rank gives to the network: half of its message in fp32 with two ranks on each of two hosts."""
    sent = []
    isend = dist.isend

    def counted(tensor, *args, **kwargs):
        sent.append(tensor.numel())
        return isend(tensor, *args, **kwargs)

    monkeypatch.setattr(direct.dist, "isend", counted)
    with ranks_on_hosts(2):
        output, mine = torch.empty(1000), torch.ones(4000)
        comm.start_reduce_scatter(output, [mine]).wait()
        assert sum(sent) == 1000
        sent.clear()
        comm.start_all_gather(mine, output).wait()
        assert sum(sent) == 1000
    sent.clear()
    comm.barrier()


@on_ranks(4)
def test_exchanges_with_the_same_words_do_not_meet_when_a_rank_is_late():
    first, second = torch.full((LARGE,), 1.0), torch.full((LARGE,), 10.0)
    with ranks_on_hosts(2):
        comm.all_reduce(torch.ones(LARGE), label="before")
        works = [comm.start_all_reduce(first)]
        if dist.get_rank() == 3:
            time.sleep(0.5)
        works.append(comm.start_all_reduce(second))
        for work in works:
            work.wait()
    assert first.eq(4).all()
    assert second.eq(40).all()


@on_ranks(4)
def test_exchanges_of_nothing():
    with ranks_on_hosts(2):
        assert hosts_of(None) is not None
        comm.reduce_scatter_single(torch.empty(0), torch.empty(0))
        comm.all_gather_single(torch.empty(0), torch.empty(0))
        comm.all_reduce(torch.empty(0))


@on_ranks(4)
def test_an_exchange_that_failed_fails_again_and_sends_nothing(monkeypatch):
    def lose(self, peer, call):
        raise CommunicationError(f"peer {peer} ended")

    with ranks_on_hosts(2):
        work = comm.start_reduce_scatter(torch.empty(2), [torch.ones(8)])
        with monkeypatch.context() as broken:
            broken.setattr(links.Links, "awaited", lose)
            for _ in range(2):
                with pytest.raises(CommunicationError, match=r"peer \d ended"):
                    work.wait()
        with pytest.raises(CommunicationError, match=r"peer \d ended"):
            work.wait()
        assert work._far is None


@on_ranks(4)
def test_what_a_host_has_summed_leaves_with_the_next_exchange():
    with ranks_on_hosts(2):
        first = comm.start_reduce_scatter(torch.empty(2), [torch.ones(8)])
        dist.barrier()  # all neighbours have written
        second = comm.start_reduce_scatter(torch.empty(2), [torch.ones(8)])
        assert first._far is not None
        second.wait()
        first.wait()


def end_in_the_middle() -> None:
    group = dist.new_group(timeout=timedelta(seconds=20))
    with ranks_on_hosts(2):
        assert hosts_of(group) is not None
        if dist.get_rank() == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        output = torch.empty(LARGE)
        comm.start_reduce_scatter(output, [torch.ones(4 * LARGE)], group).wait()
        comm.barrier(group)


def test_a_rank_that_is_killed_is_an_error_on_its_host_and_on_the_others():
    with pytest.raises(RankFailure) as failure:
        run_on_ranks(4, end_in_the_middle, timeout=60)
    text = str(failure.value)
    assert "CommunicationError: another rank ended or did not come" in text
    assert "rank 3 ended while rank 2 waited for it in reduce_scatter_single" in text
