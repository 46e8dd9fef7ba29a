"""Ranks of one host exchange data through memory they share."""

import errno
import gc
import os
import resource
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from harness import on_ranks

from deepspeed import comm
from deepspeed.comm import exchanges, rooms, shared
from deepspeed.comm.arena import arena_of
from deepspeed.comm.links import Links
from deepspeed.comm.neighbours import links_of
from deepspeed.comm.outbox import flush_all
from deepspeed.comm.rooms import SWITCH
from deepspeed.comm.summing import BLOCK
from deepspeed.errors import CommunicationError, UsageError

SIZES = [1, 5, shared.SMALL, shared.SMALL + 1, 3 * BLOCK + 7]


@pytest.fixture
def linked_pair():
    """Two ranks' links in one process."""
    first, second = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    limit = timedelta(seconds=0.2)
    ours, theirs = Links(0, {1: first}, limit), Links(1, {0: second}, limit)
    yield ours, theirs
    ours.close()
    theirs.close()


@on_ranks(2)
def test_ranks_of_one_host_are_linked():
    assert links_of(None) is not None
    assert links_of(None) is links_of(dist.group.WORLD)


@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64], ids=str)
@on_ranks(3)
def test_an_all_reduce_equals_the_sum_in_rank_order_on_every_rank(numel, dtype):
    parts = [torch.randn(numel, generator=torch.Generator().manual_seed(rank)) * 9 for rank in range(3)]
    parts = [part.to(dtype) for part in parts]
    wide = torch.float32 if dtype.is_floating_point else dtype
    expected = (parts[0].to(wide) + parts[1].to(wide) + parts[2].to(wide)).to(dtype)
    tensor = parts[dist.get_rank()].clone()
    work = comm.start_all_reduce(tensor)
    assert work.wait()
    assert work.is_completed()
    assert torch.equal(tensor, expected)


@pytest.mark.parametrize("async_op", [False, True], ids=["at once", "later"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.bool, torch.complex64], ids=str)
@on_ranks(3)
def test_a_broadcast_gives_every_rank_the_tensor_of_its_source(monkeypatch, dtype, async_op):
    monkeypatch.setattr(shared, "PIECE", 64)
    for numel in (0, 1, 7, 200, 5000):
        for source in range(3):
            tensor = (torch.arange(numel) % 5 - dist.get_rank()).to(dtype)
            work = comm.broadcast(tensor, source, async_op=async_op)
            if async_op:
                comm.barrier()
                assert work.wait()
                assert work.is_completed()
            assert torch.equal(tensor, (torch.arange(numel) % 5 - source).to(dtype))


@on_ranks(3)
def test_a_broadcast_in_a_sub_group_takes_the_source_by_its_global_rank():
    group = dist.new_group([1, 2])
    tensor = torch.full((3,), float(dist.get_rank()))
    if dist.get_rank() > 0:
        comm.broadcast(tensor, 2, group=group)
        assert tensor.tolist() == [2, 2, 2]


@pytest.mark.parametrize("switch", ["1", "0"])
@on_ranks(2)
def test_a_broadcast_keeps_the_layout_of_expanded_and_turned_tensors(monkeypatch, switch):
    monkeypatch.setenv(SWITCH, switch)
    group, rank = dist.new_group(), dist.get_rank()
    assert (links_of(group) is None) == (switch == "0")
    if switch == "1":  # gloo itself moves what is turned as it lies
        turned = torch.arange(12.0).add(100 * rank).view(3, 4).t()
        comm.broadcast(turned, 1, group=group)
        assert torch.equal(turned, torch.arange(12.0).add(100).view(3, 4).t())
    stored = torch.arange(3.0).add(100 * rank)
    guard = torch.full((64,), 7.0)
    comm.broadcast(stored.view(3, 1).expand(3, 50), 1, group=group)
    assert stored.tolist() == [100, 101, 102]
    assert guard.eq(7).all()


@on_ranks(2)
def test_the_source_of_a_long_broadcast_needs_few_rooms(monkeypatch):
    monkeypatch.setattr(shared, "PIECE", 4096)
    tensor = torch.full((100_000,), float(dist.get_rank()))
    before = len(links_of(None)._rooms)
    comm.broadcast(tensor, 0)
    assert tensor.eq(0).all()
    assert len(links_of(None)._rooms) <= before + 2


@on_ranks(3)
def test_who_is_not_in_a_group_has_no_part_in_its_calls():
    group, tensor = dist.new_group([0, 1]), torch.full((3,), float(dist.get_rank()))
    with pytest.warns(UserWarning, match="does not belong") if dist.get_rank() == 2 else nullcontext():
        comm.broadcast(tensor, 1, group=group)
    assert tensor.eq((1, 1, 2)[dist.get_rank()]).all()


def test_a_source_that_ended_is_named_by_those_who_wait_for_its_broadcast(linked_pair):
    ours, theirs = linked_pair
    work = shared.Broadcast(ours, torch.ones(3), 1)
    assert not work.is_completed()
    theirs.close()
    with pytest.raises(CommunicationError, match="rank 1 ended"):
        work.wait()


@on_ranks(2)
def test_posting_many_calls_waits_for_nobody_and_rooms_are_used_again():
    links = links_of(None)
    for _ in range(3):
        outputs = [torch.empty(2_000) for _ in range(20)]
        works = [
            comm.all_gather_single(output, torch.full((1_000,), float(index)), async_op=True)
            for index, output in enumerate(outputs)
        ]
        comm.barrier()
        for work in works:
            work.wait()
        assert [output.unique().tolist() for output in outputs] == [[float(index)] for index in range(20)]
        comm.barrier()
    assert len(links._rooms) < 60


@on_ranks(2)
def test_rooms_of_peers_are_no_memory_of_mine_between_calls():
    def mapped_of_others() -> int:
        return meminfo("RssShmem") - sum(room.nbytes for room in links_of(None)._rooms)

    output = torch.empty(2**24, dtype=torch.uint8)
    comm.all_gather_single(output, torch.ones(2**23, dtype=torch.uint8))
    before = mapped_of_others()
    for value in range(3):
        comm.all_gather_single(output, torch.full((2**23,), value, dtype=torch.uint8))
        assert output.eq(value).all()
    assert mapped_of_others() <= before < 2**22


def meminfo(name: str) -> int:
    """Bytes that this process has of one kind of memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


@on_ranks(2)
def test_a_group_that_is_gone_leaves_no_descriptors():
    def once():
        group = dist.new_group([0, 1])
        comm.all_reduce(torch.ones(10), group=group)
        comm.barrier(group=group)
        dist.destroy_process_group(group)

    once()
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        once()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_a_peer_that_ended_is_named_instead_of_waited_for(linked_pair):
    ours, theirs = linked_pair
    work = shared.SumWhole(ours, torch.ones(3), dist.ReduceOp.SUM)
    theirs.close()
    with pytest.raises(CommunicationError, match="rank 1 ended"):
        work.wait()


def test_who_looks_for_a_peer_that_ended_is_told(linked_pair):
    ours, theirs = linked_pair
    work = shared.SumWhole(ours, torch.ones(3), dist.ReduceOp.SUM)
    assert not work.is_completed()
    theirs.close()
    with pytest.raises(CommunicationError, match="rank 1 ended"):
        work.is_completed()


def test_what_a_peer_sent_before_it_ended_arrives(linked_pair):
    ours, theirs = linked_pair
    chunks = [torch.empty(2), torch.empty(2)]
    work = shared.Gather(ours, [[chunk] for chunk in chunks])
    shared.Gather(theirs, [[torch.empty(2)], [torch.ones(2)]])
    theirs.close()  # with our signal unread
    assert work.is_completed()
    assert work.wait()
    assert chunks[1].tolist() == [1, 1]
    with pytest.raises(CommunicationError, match="rank 1 ended"):
        shared.Gather(ours, [[chunk] for chunk in chunks])


def test_a_peer_that_never_comes_is_named_after_the_timeout(linked_pair):
    ours, _theirs = linked_pair
    work = shared.SumWhole(ours, torch.ones(3), dist.ReduceOp.SUM)
    assert not work.is_completed()
    with pytest.raises(CommunicationError, match="rank 1 did not reach"):
        work.wait()


def test_who_waits_may_say_for_how_long(linked_pair):
    ours, _theirs = linked_pair
    ours._timeout = 60
    work = shared.SumWhole(ours, torch.ones(3), dist.ReduceOp.SUM)
    with pytest.raises(CommunicationError, match="rank 1 did not reach"):
        work.wait(timedelta(seconds=0.1))
    assert ours._patience == 60


@pytest.mark.parametrize(
    ("stop", "again"),
    [(NotImplementedError, NotImplementedError), (KeyboardInterrupt, CommunicationError)],
)
def test_a_wait_that_failed_fails_again(monkeypatch, linked_pair, stop, again):
    def reduce_parts(*args):
        raise stop

    ours, theirs = linked_pair
    work, _ = (shared.SumWhole(one, torch.ones(3), dist.ReduceOp.SUM, b"sum") for one in (ours, theirs))
    monkeypatch.setattr(shared, "reduce_parts", reduce_parts)
    with pytest.raises(stop):
        work.wait()
    monkeypatch.undo()
    with pytest.raises(again):
        work.wait()


def start_many(links, count):
    tensors = [torch.full((3,), float(index)) for index in range(count)]
    return tensors, [shared.SumWhole(links, tensor, dist.ReduceOp.SUM) for tensor in tensors]


def wait_for_all(started, count):
    tensors, works = started
    for work in works:
        work.wait()
    assert [tensor[0].item() for tensor in tensors] == [2 * index for index in range(count)]


def test_signals_beyond_what_a_socket_takes_leave_later(linked_pair):
    count = 2000
    ours = start_many(linked_pair[0], count)
    assert len(linked_pair[0]._outboxes[1])
    theirs = start_many(linked_pair[1], count)
    with ThreadPoolExecutor() as pool:
        for done in [pool.submit(wait_for_all, one, count) for one in (ours, theirs)]:
            done.result()
    for links in linked_pair * 20:
        links.drain()
    assert not flush_all()


def test_signals_that_are_late_leave_with_a_wait_in_another_group(linked_pair):
    ours, theirs = linked_pair
    others = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    limit = timedelta(seconds=20)
    ours_too, theirs_too = Links(0, {1: others[0]}, limit), Links(1, {0: others[1]}, limit)
    ours._patience = theirs._patience = ours._timeout = theirs._timeout = 20
    mine, count = start_many(ours, 2000), 2000
    assert len(ours._outboxes[1])

    def peer():
        wait_for_all(start_many(theirs, count), count)
        wait_for_all(start_many(theirs_too, 2), 2)

    with ThreadPoolExecutor() as pool:
        done = pool.submit(peer)
        wait_for_all(start_many(ours_too, 2), 2)
        wait_for_all(mine, count)
        done.result()
    ours_too.close()
    theirs_too.close()


def test_signals_that_are_late_leave_before_the_end(linked_pair):
    ours, theirs = linked_pair
    tensors, _ = start_many(ours, 600)
    assert len(ours._outboxes[1])
    end = threading.Thread(target=ours.close)
    end.start()
    numbers = []
    for index in range(len(tensors)):
        theirs.note(b"")
        room = theirs.awaited(0, index + 1)
        numbers.append(room.view(3, torch.float32)[0].item())
    end.join()
    assert numbers == [float(index) for index in range(len(tensors))]


@on_ranks(2)
def test_messages_that_grow_share_few_rooms_and_no_descriptors():
    links = links_of(None)
    rooms, descriptors = len(links._rooms), len(os.listdir("/proc/self/fd"))
    for size in range(1, 200_000, 2_000):
        whole = torch.empty(2 * size)
        comm.all_gather_single(whole, torch.full((size,), float(size)))
        assert whole.eq(size).all()
    assert len(links._rooms) - rooms < 3 * 10
    assert len(os.listdir("/proc/self/fd")) <= descriptors


LIMITS = [(errno.EMFILE, "ulimit -n"), (errno.EFBIG, "ulimit -f"), (errno.ENOMEM, "ulimit -v")]


@pytest.mark.parametrize(("number", "limit"), LIMITS, ids=lambda value: str(value))
@on_ranks(2)
def test_memory_that_cannot_be_had_is_an_error_that_names_the_limit(monkeypatch, number, limit):
    def refuse(*args):
        raise OSError(number, os.strerror(number))

    arena = arena_of(None)
    links = links_of(None)
    monkeypatch.setattr(os, "ftruncate", refuse)
    with pytest.raises(CommunicationError, match=f"cannot share {2**30} bytes more, .*{limit}.*{SWITCH}=0"):
        links.room(2**30)
    with pytest.raises(CommunicationError, match=f"cannot map .* bytes .*{limit}.*{SWITCH}=0"):
        arena.block(1)
    with pytest.raises(CommunicationError, match=f"cannot make memory .*{limit}.*{SWITCH}=0"):
        arena_of(None)


def test_a_descriptor_that_cannot_be_sent_is_an_error_that_names_the_limit(monkeypatch, linked_pair):
    def refuse(*args):
        raise OSError(errno.ETOOMANYREFS, os.strerror(errno.ETOOMANYREFS))

    ours, _ = linked_pair
    monkeypatch.setattr(socket, "send_fds", refuse)
    with pytest.raises(CommunicationError, match=r"rank 0 cannot share memory with rank 1: .*ulimit -n"):
        ours.announce(ours.room(8), b"sum")


@on_ranks(2)
def test_a_rank_that_may_make_no_large_files_leaves_all_to_gloo(monkeypatch):
    def refuse(descriptor, length):
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))

    if dist.get_rank() == 1:
        monkeypatch.setattr(os, "ftruncate", refuse)
    group = dist.new_group()
    tensor = torch.ones(3)
    comm.all_reduce(tensor, group=group)
    assert tensor.eq(2).all()
    assert links_of(group) is None
    dist.destroy_process_group(group)


@pytest.fixture
def no_more_files():
    """Let the process open no further file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_room_of_a_peer_that_cannot_be_received_is_an_error_that_says_so(linked_pair, request):
    ours, theirs = linked_pair
    theirs.announce(theirs.room(8), b"sum")
    request.getfixturevalue("no_more_files")
    for _ in range(2):
        with pytest.raises(CommunicationError, match=r"rank 0 cannot read what rank 1 shares.*ulimit -n.*=0"):
            ours.awaited(1, 1)


def test_a_room_of_a_peer_that_cannot_be_mapped_is_an_error_that_says_so(monkeypatch, linked_pair):
    def refuse(*args):
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    ours, theirs = linked_pair
    theirs.announce(theirs.room(8), b"sum")
    monkeypatch.setattr(rooms, "_mapped", refuse)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(CommunicationError, match=r"rank 0 cannot read .* Cannot allocate memory"):
        ours.awaited(1, 1)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("switch", ["0", "off", "False"])
@on_ranks(2)
def test_shared_memory_can_be_switched_off_or_be_refused(monkeypatch, switch):
    def refuse(*args):
        raise PermissionError

    with monkeypatch.context() as patched:
        patched.setenv(SWITCH, switch)
        assert links_of(dist.new_group()) is None
    monkeypatch.setattr(os, "memfd_create", refuse)
    assert links_of(dist.new_group()) is None


def test_a_forked_child_does_not_hide_that_its_parent_ended(linked_pair):
    ours, theirs = linked_pair
    stay, go = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(go)
        os.read(stay, 1)
        os._exit(0)
    try:
        theirs.close()
        with pytest.raises(CommunicationError, match="rank 1 ended"):
            shared.SumWhole(ours, torch.ones(3), dist.ReduceOp.SUM).wait()
    finally:
        os.close(go)
        os.waitpid(child, 0)
        os.close(stay)


@pytest.mark.parametrize("op", ["SUM", "AVG", "MAX", "MIN"])
@on_ranks(2)
def test_floats_of_8_bits_are_reduced_in_fp32(op):
    tensor = torch.tensor([1.0, 3.0, -2.0]).mul_(dist.get_rank() + 1).to(torch.float8_e4m3fn)
    comm.all_reduce(tensor, op=getattr(dist.ReduceOp, op))
    expected = {"SUM": [3, 9, -6], "AVG": [1.5, 4.5, -3], "MAX": [2, 6, -2], "MIN": [1, 3, -4]}
    assert tensor.float().tolist() == expected[op]


@on_ranks(2)
def test_sums_of_unsigned_integers_are_refused_as_by_gloo_and_calls_go_on():
    with pytest.raises(RuntimeError, match="Invalid scalar type"):
        comm.all_reduce(torch.ones(3, dtype=torch.uint16))
    comm.barrier()


@on_ranks(2)
def test_all_to_all_of_single_elements_with_odd_strides():
    rank, table = dist.get_rank(), torch.arange(8.0).view(4, 2)
    sent = [(table + 10 * rank)[peer : peer + 1, 1] for peer in range(2)]
    received = [torch.empty(4, 2)[:1, 1] for _ in range(2)]
    comm.all_to_all(received, sent)
    assert [one.item() for one in received] == [1 + 2 * rank, 11 + 2 * rank]


def test_a_room_is_not_written_while_a_peer_still_reads_it(linked_pair):
    ours, theirs = linked_pair
    first = shared.Gather(ours, [[torch.tensor([1.0, 2.0])], [torch.empty(2)]])
    second = shared.Gather(ours, [[torch.tensor([3.0, 4.0])], [torch.empty(2)]])
    chunks = [[torch.empty(2), torch.empty(2)] for _ in range(2)]
    late = [shared.Gather(theirs, [[chunk] for chunk in one]) for one in chunks]
    reader = threading.Thread(target=lambda: [work.wait() for work in late])
    reader.start()
    for work in (first, second):
        work.wait()
    reader.join()
    assert [one[0].tolist() for one in chunks] == [[1.0, 2.0], [3.0, 4.0]]
    third = ours.room(8)
    assert third.index in (0, 1)


def test_other_words_for_the_same_call_are_an_error_that_stays(linked_pair):
    ours, theirs = linked_pair
    shared.SumWhole(theirs, torch.ones(3), dist.ReduceOp.SUM, b"all_reduce of 3 x float32: norm")
    for words in (b"all_reduce of 2 x float32", b"another call"):
        with pytest.raises(CommunicationError, match=r"rank 0 is in .*2 x float32.* rank 1 is in .*norm"):
            shared.SumWhole(ours, torch.ones(2), dist.ReduceOp.SUM, words)


def test_a_noted_call_is_compared_with_the_one_that_others_make(linked_pair):
    ours, theirs = linked_pair
    theirs.note(b"broadcast")
    with pytest.raises(CommunicationError, match="rank 1 is in broadcast"):
        shared.SumWhole(ours, torch.ones(2), dist.ReduceOp.SUM, b"all_reduce").wait()


PARTS = [7, 500, 1, 90_000, 12, 3, 29_477]
"""Elements of the parts of a message of 3 ranks; most cuts between ranks fall inside of parts."""


def message_of(rank: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    parts = [torch.randn(numel, generator=generator).to(dtype) for numel in PARTS]
    return [
        torch.zeros(1, dtype=dtype).expand(numel) if numel == 500 else part
        for part, numel in zip(parts, PARTS, strict=True)
    ]


def sum_in_rank_order(dtype: torch.dtype) -> torch.Tensor:
    wholes = [torch.cat(message_of(rank, dtype)).float() for rank in range(3)]
    return ((wholes[0] + wholes[1]) + wholes[2]).to(dtype)


@pytest.mark.parametrize("linked", [True, False], ids=["linked", "not linked"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@on_ranks(3)
def test_a_message_in_parts_is_reduced_like_one_that_lies_together(monkeypatch, linked, dtype):
    if not linked:
        monkeypatch.setattr(exchanges, "links_of", lambda group: None)
    rank, expected = dist.get_rank(), sum_in_rank_order(dtype)
    chunk = torch.empty(len(expected) // 3, dtype=dtype)
    work = comm.start_reduce_scatter(chunk, message_of(rank, dtype))
    assert work.wait()
    assert torch.equal(chunk, expected.chunk(3)[rank])
    everywhere = torch.empty_like(expected)
    assert comm.start_all_reduce(everywhere, message_of(rank, dtype)).wait()
    assert_near(everywhere, expected)


def assert_near(value: torch.Tensor, expected: torch.Tensor) -> None:
    """gloo sums in an order of its own, and rounds at each addition."""
    step = torch.finfo(value.dtype).eps
    torch.testing.assert_close(value, expected, rtol=2 * step, atol=4 * step)


@on_ranks(2)
def test_parts_are_sent_in_the_dtype_of_the_output_and_ones_own_are_not_rounded():
    rank = dist.get_rank()
    parts = [torch.tensor([1.001]), torch.tensor([2.003, 3.001]), torch.tensor([4.003])]
    chunk = torch.empty(2, dtype=torch.bfloat16)
    comm.start_reduce_scatter(chunk, parts).wait()
    mine = torch.cat(parts).chunk(2)[rank]
    assert torch.equal(chunk, (mine + mine.bfloat16()).bfloat16())


@on_ranks(2)
def test_parts_of_a_small_message_may_be_empty():
    tensor = torch.empty(3)
    comm.start_all_reduce(tensor, [torch.ones(1), torch.empty(0), torch.full((2,), 2.0)]).wait()
    assert tensor.tolist() == [2, 4, 4]


@pytest.mark.parametrize("async_op", [False, True], ids=["at once", "later"])
@pytest.mark.parametrize("op", ["SUM", "AVG", "MAX", "MIN"])
@on_ranks(3)
def test_a_large_all_reduce_is_exact_in_rank_order_under_torchs_own_name(monkeypatch, op, async_op):
    monkeypatch.setattr(dist, "all_reduce", None)  # gloo's is not asked
    rows = torch.stack([torch.randn(100_003, generator=torch.Generator().manual_seed(r)) for r in range(3)])
    total = rows[0] + rows[1] + rows[2]
    expected = {"SUM": total, "AVG": total / 3, "MAX": rows.amax(0), "MIN": rows.amin(0)}[op]
    tensor = rows[dist.get_rank()].clone()
    work = comm.all_reduce(tensor, getattr(dist.ReduceOp, op), async_op=async_op)
    if async_op:
        comm.barrier()  # waiting takes no part of the peers
        assert work.wait()
    assert torch.equal(tensor, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64, torch.bool, torch.complex128], ids=str)
@on_ranks(3)
def test_all_to_all_gives_every_rank_its_rows(dtype):
    rank = dist.get_rank()
    # Rank r sends r + to + 1 rows of two to rank `to`: their values say who sent what to whom.
    sent = [torch.full((rank + to + 1, 2), 10 * rank + to).to(dtype) for to in range(3)]
    expected = [torch.full((rank + source + 1, 2), 10 * source + rank).to(dtype) for source in range(3)]
    sizes = [len(one) for one in expected], [len(one) for one in sent]
    output = torch.empty(sum(sizes[0]), 2, dtype=dtype)
    comm.all_to_all_single(output, torch.cat(sent), *sizes)
    assert torch.equal(output, torch.cat(expected))
    outputs = [torch.empty_like(one) for one in expected]
    work = comm.all_to_all(outputs, sent, async_op=True)
    comm.barrier()
    assert work.wait()
    assert all(torch.equal(*pair) for pair in zip(outputs, expected, strict=True))


@on_ranks(2)
def test_all_to_all_without_sizes_shares_the_rows_equally():
    output = torch.empty(4)
    comm.all_to_all_single(output, torch.arange(4.0) + 10 * dist.get_rank())
    assert output.tolist() == [[0, 1, 10, 11], [2, 3, 12, 13]][dist.get_rank()]


@on_ranks(2)
def test_sizes_that_do_not_fit_are_refused_by_name():
    with pytest.raises(
        UsageError, match=r"input_split_sizes for 2 ranks that add up to the 3 rows .* got \[1, 1\]"
    ):
        comm.all_to_all_single(torch.empty(3), torch.empty(3), [1, 2], [1, 1])
    with pytest.raises(UsageError, match="output_split_sizes"):
        comm.all_to_all_single(torch.empty(3), torch.empty(2))


def test_a_peer_that_sends_other_sizes_than_expected_is_named(linked_pair):
    ours, theirs = linked_pair
    work = shared.Exchange(ours, [torch.empty(1), torch.empty(3)], [torch.empty(1), torch.empty(2)])
    shared.Exchange(theirs, [torch.empty(2), torch.empty(1)], [torch.empty(1), torch.empty(1)])
    with pytest.raises(CommunicationError, match="rank 1 sends 1 elements to rank 0, which expects 3"):
        work.wait()


def test_a_peer_whose_tensor_went_another_way_is_named(linked_pair):
    ours, theirs = linked_pair
    work = shared.Gather(ours, [[torch.zeros(2)], [torch.empty(2)]])
    theirs.note(b"")
    with pytest.raises(CommunicationError, match="with tensors of another kind than rank 0"):
        work.wait()


@on_ranks(2)
def test_shared_memory_can_be_switched_off_on_any_rank(monkeypatch):
    if dist.get_rank() == 1:
        monkeypatch.setenv(SWITCH, "0")
    group = dist.new_group([0, 1])
    assert links_of(group) is None
    tensor = torch.ones(50_000)
    comm.all_reduce(tensor, group=group)
    assert tensor.eq(2).all()


@on_ranks(2)
def test_a_rank_that_sends_itself_other_sizes_than_it_expects_is_refused():
    outputs, inputs = [torch.zeros(4), torch.zeros(4)], [torch.ones(4), torch.ones(4)]
    if dist.get_rank() == 0:
        inputs[0] = torch.ones(1)
        with pytest.raises(CommunicationError, match="rank 0 sends 1 elements to rank 0, which expects 4"):
            comm.all_to_all(outputs, inputs)
    else:
        comm.all_to_all(outputs, inputs)
    comm.barrier()


@on_ranks(2)
def test_tensors_of_inference_mode_are_reduced_and_rooms_made_in_it_are_used_after_it():
    group = dist.new_group([0, 1])  # has no rooms yet
    with torch.inference_mode():
        large = torch.full((50_000,), 1.0 + dist.get_rank())
        comm.all_reduce(torch.ones(70_000), group=group)
    comm.all_reduce(large, group=group)
    assert large.eq(3).all()
    trained = torch.ones(60_000)
    comm.all_reduce(trained, group=group)
    assert trained.eq(2).all()
