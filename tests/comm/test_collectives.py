"""Collectives equal their definition, whatever way they take."""

from contextlib import contextmanager, nullcontext

import pytest
import torch
import torch.distributed as dist
from harness import on_ranks

from deepspeed import comm
from deepspeed.comm import direct, exchanges
from deepspeed.errors import UsageError

OPS = {"sum": dist.ReduceOp.SUM, "avg": dist.ReduceOp.AVG, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8]


def made_by(rank: int, numel: int, dtype: torch.dtype, salt: int = 0) -> torch.Tensor:
    """What `rank` contributes: every rank can compute every other rank's."""
    seed = torch.Generator().manual_seed(1000 * salt + rank)
    if dtype.is_floating_point:
        return torch.randn(numel, generator=seed).to(dtype)
    return torch.randint(0, 50, (numel,), generator=seed).to(dtype)


def reduced(parts: list[torch.Tensor], op: str) -> torch.Tensor:
    """Reduce in rank order, 16-bit floats in fp32: the definition."""
    wide = [part.float() if part.is_floating_point() else part for part in parts]
    total = wide[0].clone()
    for part in wide[1:]:
        if op == "min":
            total = torch.minimum(total, part)
        elif op == "max":
            total = torch.maximum(total, part)
        else:
            total = total + part
    if op == "avg":
        total = total.div(len(parts), rounding_mode=None if total.is_floating_point() else "trunc")
    return total


@contextmanager
def without_shared_memory():
    """Make collectives take the way of ranks on different hosts."""
    original, exchanges.links_of = exchanges.links_of, lambda group: None
    try:
        yield
    finally:
        exchanges.links_of = original


def check_reduce_scatter(op: str, dtype: torch.dtype, numel: int, async_op: bool, group=None) -> None:
    check_one_way(op, dtype, numel, async_op, group)
    with without_shared_memory():
        check_one_way(op, dtype, numel, async_op, group)


def check_one_way(op: str, dtype: torch.dtype, numel: int, async_op: bool, group) -> None:
    me, world = dist.get_rank(group), dist.get_world_size(group)
    parts = [made_by(rank, numel * world, dtype) for rank in range(world)]
    expected = reduced(parts, op)[me * numel : (me + 1) * numel].to(dtype)
    output = torch.empty(numel, dtype=dtype)
    work = comm.reduce_scatter_single(output, parts[me], op=OPS[op], group=group, async_op=async_op)
    if async_op:
        work.wait()
    else:
        assert work is None
    assert torch.equal(output, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
@on_ranks(2)
def test_reduce_scatter_single_equals_its_definition_bit_for_bit(op, dtype):
    check_reduce_scatter(op, dtype, 37, async_op=False)
    check_reduce_scatter(op, dtype, 37, async_op=True)


@pytest.mark.parametrize("numel", [1, 5, 300_000, 700_001])
@on_ranks(3)
def test_tensors_of_many_blocks_reduce_on_three_ranks(numel):
    check_reduce_scatter("sum", torch.bfloat16, numel, async_op=False)
    check_reduce_scatter("avg", torch.float32, numel, async_op=True)


@on_ranks(4)
def test_sub_groups_reduce_and_gather_among_themselves():
    pairs = [dist.new_group([0, 3]), dist.new_group([1, 2])]
    mine = pairs[0] if dist.get_rank() in (0, 3) else pairs[1]
    check_reduce_scatter("sum", torch.bfloat16, 11, async_op=True, group=mine)
    output = torch.empty(2, dtype=torch.int64)
    comm.all_gather_single(output, torch.tensor([dist.get_rank()]), group=mine)
    assert output.tolist() == comm.get_all_ranks_from_group(mine)
    check_reduce_scatter("max", torch.int32, 3, async_op=False)


@on_ranks(1)
def test_one_rank_needs_no_special_case():
    check_reduce_scatter("sum", torch.bfloat16, 9, async_op=False)
    check_reduce_scatter("avg", torch.int64, 9, async_op=True)
    output = torch.empty(4)
    comm.all_gather_single(output, torch.arange(4.0))
    assert output.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("way", [nullcontext, without_shared_memory])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_ranks(3)
def test_all_gather_single_fills_in_rank_order(dtype, way):
    with way():
        check_gather(dtype)


def check_gather(dtype):
    me, world = dist.get_rank(), dist.get_world_size()
    expected = torch.cat([made_by(rank, 13, dtype) for rank in range(world)])
    output = torch.empty(13 * world, dtype=dtype)
    assert comm.all_gather_single(output, made_by(me, 13, dtype)) is None
    assert torch.equal(output, expected)
    output.zero_()
    comm.all_gather_into_tensor(output, made_by(me, 13, dtype), async_op=True).wait()
    assert torch.equal(output, expected)


@on_ranks(2)
def test_a_rank_may_gather_in_place_and_reduce_in_place():
    me = dist.get_rank()
    flat = torch.zeros(8)
    mine = flat[4 * me : 4 * me + 4]
    mine.fill_(me + 1)
    comm.all_gather_single(flat, mine)
    assert flat.tolist() == [1] * 4 + [2] * 4
    flat.add_(me)
    comm.reduce_scatter_single(mine, flat)
    assert mine.tolist() == [2 * (me + 1) + 1] * 4
    flat.fill_(me + 1)
    comm.reduce_scatter_single(mine, flat, async_op=True).wait()
    assert mine.tolist() == [3] * 4


@on_ranks(2)
def test_an_fp32_output_keeps_the_sum_of_16_bit_inputs_unrounded():
    values = torch.full((2,), 1.0 if dist.get_rank() == 0 else 2.0**-12, dtype=torch.bfloat16)
    for async_op in (False, True):
        output = torch.empty(1)
        work = comm.reduce_scatter_single(output, values, async_op=async_op)
        if work is not None:
            work.wait()
        assert output.item() == 1 + 2.0**-12


@pytest.mark.parametrize("way", [nullcontext, without_shared_memory])
@on_ranks(2)
def test_calls_in_flight_together_do_not_mix_their_data(way):
    with way():
        check_calls_in_flight()


def check_calls_in_flight():
    me, world, numel = dist.get_rank(), dist.get_world_size(), 70_000
    started = []
    for salt in range(3):
        parts = [made_by(rank, numel * world, torch.float32, salt) for rank in range(world)]
        output, whole = torch.empty(numel), torch.empty(numel * world)
        reduce = comm.reduce_scatter_single(output, parts[me], async_op=salt != 1)
        gather = comm.all_gather_single(whole, parts[me][:numel].clone(), async_op=True)
        started.append((reduce, gather, output, whole, parts))
    for reduce, gather, output, whole, parts in reversed(started):
        for work in (gather, reduce):
            assert work is None or work.wait()
            assert work is None or work.is_completed()
        assert torch.equal(output, (parts[0] + parts[1])[me * numel : (me + 1) * numel])
        assert torch.equal(whole, torch.cat([part[:numel] for part in parts]))


@on_ranks(2)
def test_one_rank_may_wait_later_than_another():
    me = dist.get_rank()
    values, output = torch.arange(400_000.0), torch.empty(200_000)
    work = comm.reduce_scatter_single(output, values, async_op=me == 0)
    if work is not None:
        work.wait()
    assert torch.equal(output, 2 * values[me * 200_000 : (me + 1) * 200_000])


@on_ranks(2)
def test_users_own_messages_do_not_meet_ours():
    me, peer = dist.get_rank(), 1 - dist.get_rank()
    note = torch.empty(1)
    pending = comm.irecv(note, peer)
    output = torch.empty(2)
    comm.all_gather_single(output, torch.tensor([float(me)]))
    comm.send(torch.tensor([10.0 + me]), peer)
    pending.wait()
    assert output.tolist() == [0, 1]
    assert note.item() == 10 + peer


@on_ranks(2)
def test_parameters_are_data_and_leave_no_graph():
    param = torch.nn.Parameter(torch.ones(2))
    whole, output = torch.empty(4), torch.empty(1)
    comm.all_gather_single(whole, param)
    comm.reduce_scatter_single(output, param)
    assert not whole.requires_grad
    assert not output.requires_grad


@on_ranks(2)
def test_lists_of_tensors_gather_and_reduce_likewise():
    me = dist.get_rank()
    outputs = [torch.empty(2, 2, dtype=torch.bfloat16) for _ in range(2)]
    comm.all_gather(outputs, torch.full((2, 2), float(me), dtype=torch.bfloat16))
    assert [one.unique().tolist() for one in outputs] == [[0], [1]]
    output = torch.empty(3)
    comm.reduce_scatter(output, [torch.full((3,), me + 1.0), torch.full((3,), me + 10.0)])
    assert output.tolist() == [[3.0] * 3, [21.0] * 3][me]


@on_ranks(2)
def test_what_the_direct_way_cannot_do_goes_to_torch():
    me = dist.get_rank()
    output = torch.empty(2)
    comm.reduce_scatter_single(output, torch.full((4,), me + 2.0), op=dist.ReduceOp.PRODUCT)
    assert output.tolist() == [6, 6]
    empty = torch.empty(0)
    comm.all_gather_single(empty, torch.empty(0))
    comm.reduce_scatter_single(empty, torch.empty(0))


@on_ranks(2)
def test_sizes_that_do_not_fit_are_named():
    with pytest.raises(UsageError, match=r"expected 2 \(ranks\) x 3 elements, got 5"):
        comm.reduce_scatter_single(torch.empty(3), torch.empty(5))
    with pytest.raises(UsageError, match="all_gather_single"):
        comm.all_gather_single(torch.empty(5), torch.empty(3))


@on_ranks(2)
def test_the_rest_of_the_namespace_works_like_torch():
    me = dist.get_rank()
    values = torch.full((2,), float(me + 1))
    comm.all_reduce(values, op=comm.ReduceOp.MAX)
    assert values.tolist() == [2, 2]
    comm.all_reduce(values, async_op=True).wait()
    assert values.tolist() == [4, 4]
    comm.broadcast(values.fill_(me), src=1)
    assert values.tolist() == [1, 1]
    swapped = torch.empty(2)
    comm.all_to_all_single(swapped, torch.tensor([10.0 * me, 10.0 * me + 1]))
    assert swapped.tolist() == [me, 10 + me]
    lists = [torch.empty(1), torch.empty(1)]
    comm.all_to_all(lists, [torch.tensor([me + 0.0]), torch.tensor([me + 5.0])])
    assert [one.item() for one in lists] == [5.0 * me, 5.0 * me + 1]
    total = torch.ones(1)
    comm.reduce(total, dst=0)
    parts = [torch.empty(1), torch.empty(1)] if me == 0 else None
    comm.gather(torch.tensor([float(me)]), parts, dst=0)
    comm.scatter(total, [torch.tensor([7.0]), torch.tensor([8.0])] if me == 0 else None, src=0)
    assert total.item() == 7 + me
    objects = [None, None]
    comm.all_gather_object(objects, {"rank": me})
    assert objects == [{"rank": 0}, {"rank": 1}]
    if me == 0:
        comm.send(values, 1)
    else:
        assert comm.recv(values, 0) == 0
    comm.barrier()
    assert (comm.get_rank(), comm.get_world_size(), comm.get_local_rank()) == (me, 2, me)
    assert comm.get_all_ranks_from_group(comm.get_world_group()) == [0, 1]
    assert comm.get_global_rank(comm.get_world_group(), 1) == 1
    assert comm.TorchBackend().get_world_size() == 2
    assert comm.initialize_mesh_device((2, 1), ("data_parallel", "sequence_parallel")).size() == 2


@on_ranks(2)
def test_cpu_tensors_of_a_gloo_group_go_direct():
    assert direct.is_direct(None, torch.empty(3))
    assert not direct.is_direct(None, torch.empty(3, 2).t())
    assert not direct.is_direct(None, torch.empty(3, device="meta"))
