"""torch.distributed's own functions on the backend that moves data through memory the ranks share."""

import gc
import multiprocessing as mp
import os
import signal
import sys
import time
from contextlib import contextmanager
from datetime import timedelta
from functools import partial, reduce
from operator import mul
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from harness import free_port, on_ranks, run_on_ranks, run_to_their_end
from reference import PlainTrainer
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from toys import make_toy, toy_batch, toy_loss
from training import assert_equal_training, config_for, drive_engine

import deepspeed
from deepspeed import comm
from deepspeed.comm import backend, shared
from deepspeed.comm.neighbours import links_of
from deepspeed.comm.rooms import SWITCH
from deepspeed.comm.standstill import watch
from deepspeed.errors import CommunicationError, ConfigError

RANKS = pytest.mark.parametrize("ranks", [2, 3])
FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
DTYPES = [*FLOATS, torch.int64, torch.uint8]
SIZES = [1, 7, shared.SMALL + 3]
SOON = 60.0  # seconds that a loaded machine gets


@contextmanager
def gloo_is_not_asked():
    group = dist.group.WORLD
    gloo, group._gloo = group._gloo, Refusal()
    try:
        yield
    finally:
        group._gloo = gloo


class Refusal:
    def __getattr__(self, name):
        def refuse(*_):
            raise AssertionError(f"gloo was asked: {name}")

        return refuse


def made_by(rank: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    """Numbers whose sums and products every dtype holds."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(0 if dtype is torch.bool else 1, 5, (numel,), generator=generator).to(dtype)


def reduced(op: str, parts: list[torch.Tensor]) -> torch.Tensor:
    dtype = parts[0].dtype
    wide = torch.promote_types(dtype, torch.float32 if dtype.is_floating_point else torch.int64)
    rows = torch.stack([part.to(wide) for part in parts])
    if op == "PRODUCT":
        return reduce(mul, rows).to(dtype)
    if op == "AVG":
        mode = None if dtype.is_floating_point else "trunc"
        return rows.sum(0).div(len(rows), rounding_mode=mode).to(dtype)
    return {"SUM": rows.sum(0), "MIN": rows.amin(0), "MAX": rows.amax(0)}[op].to(dtype)


def run(function, *args, async_op: bool, **kwargs) -> None:
    work = function(*args, async_op=async_op, **kwargs)
    assert (work is not None) == async_op
    if async_op:
        dist.barrier()
        assert work.wait()


def reductions(op, dtype):
    rank, ranks, how = dist.get_rank(), dist.get_world_size(), getattr(dist.ReduceOp, op)
    for async_op in (False, True):
        for numel in SIZES:
            parts = [made_by(one, numel * ranks, dtype) for one in range(ranks)]
            expected = reduced(op, parts)
            tensor = parts[rank].clone()
            run(dist.all_reduce, tensor, op=how, async_op=async_op)
            assert torch.equal(tensor, expected)
            chunk = torch.empty(numel, dtype=dtype)
            run(dist.reduce_scatter_single, chunk, parts[rank], op=how, async_op=async_op)
            assert torch.equal(chunk, expected.chunk(ranks)[rank])
            chunk = torch.empty(numel, dtype=dtype)
            run(dist.reduce_scatter, chunk, list(parts[rank].chunk(ranks)), op=how, async_op=async_op)
            assert torch.equal(chunk, expected.chunk(ranks)[rank])


def all_reductions(op):
    with gloo_is_not_asked():
        for dtype in DTYPES:
            reductions(op, dtype)


@pytest.mark.parametrize("op", ["SUM", "AVG", "MIN", "MAX"])
@RANKS
def test_reductions_equal_plain_ones_without_gloo(ranks, op):
    run_on_ranks(ranks, all_reductions, op, backend="shm")


def gloos_reductions():
    for dtype in (torch.float32, torch.float64, torch.int64):
        reductions("PRODUCT", dtype)
    tensor = torch.tensor([dist.get_rank() == 0, False])
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    assert tensor.tolist() == [True, False]
    for target in range(dist.get_world_size()):
        tensor = torch.full((3,), 2.0)
        dist.reduce(tensor, target, op=dist.ReduceOp.PRODUCT)
        if dist.get_rank() == target:
            assert tensor.eq(2 ** dist.get_world_size()).all()


@RANKS
def test_operations_that_only_gloo_has_go_to_gloo(ranks):
    run_on_ranks(ranks, gloos_reductions, backend="shm")


def moves(dtype, async_op):
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for numel in SIZES:
        parts = [made_by(one, numel, dtype) for one in range(ranks)]
        whole = torch.empty(numel * ranks, dtype=dtype)
        run(dist.all_gather_single, whole, parts[rank], async_op=async_op)
        assert torch.equal(whole, torch.cat(parts))
        outputs = [torch.empty_like(part) for part in parts]
        run(dist.all_gather, outputs, parts[rank], async_op=async_op)
        assert all(map(torch.equal, outputs, parts))
        for source in range(ranks):
            tensor = parts[rank].clone()
            run(dist.broadcast, tensor, source, async_op=async_op)
            assert torch.equal(tensor, parts[source])
    # rank r sends r + to + 1 rows of two to rank `to`
    sent = [made_by(10 * rank + to, 2 * (rank + to + 1), dtype).view(-1, 2) for to in range(ranks)]
    expected = [made_by(10 * one + rank, 2 * (one + rank + 1), dtype).view(-1, 2) for one in range(ranks)]
    output = torch.empty_like(torch.cat(expected))
    sizes = [len(one) for one in expected], [len(one) for one in sent]
    run(dist.all_to_all_single, output, torch.cat(sent), *sizes, async_op=async_op)
    assert torch.equal(output, torch.cat(expected))
    outputs = [torch.empty_like(one) for one in expected]
    run(dist.all_to_all, outputs, sent, async_op=async_op)
    assert all(map(torch.equal, outputs, expected))


def all_moves():
    with gloo_is_not_asked():
        for dtype in (*DTYPES, torch.bool, torch.complex64):
            for async_op in (False, True):
                moves(dtype, async_op)


@RANKS
def test_every_rank_gets_what_is_moved_without_gloo(ranks):
    run_on_ranks(ranks, all_moves, backend="shm")


@on_ranks(3, backend="shm")
def test_sends_gathers_and_scatters_are_gloos():
    rank, expected = dist.get_rank(), [made_by(one, 4, torch.float32) for one in range(3)]
    outputs = [torch.empty(4) for _ in range(3)] if rank == 1 else None
    dist.gather(expected[rank], outputs, dst=1)
    assert rank != 1 or all(map(torch.equal, outputs, expected))
    mine = torch.empty(4)
    dist.scatter(mine, expected if rank == 2 else None, src=2)
    assert torch.equal(mine, expected[rank])
    if rank == 0:
        dist.send(expected[0], 1)
    if rank == 1:
        assert dist.recv(mine) == 0
        assert torch.equal(mine, expected[0])


@on_ranks(3, backend="shm")
def test_objects_are_gathered_and_broadcast():
    rank, found = dist.get_rank(), [None] * 3
    dist.all_gather_object(found, {"rank": rank, "text": "x" * rank})
    assert found == [{"rank": one, "text": "x" * one} for one in range(3)]
    objects = [rank, ("a", rank)]
    dist.broadcast_object_list(objects, src=2)
    assert objects == [2, ("a", 2)]


@on_ranks(3, backend="shm")
def test_groups_of_some_ranks_and_of_either_kind_live_side_by_side():
    rank = dist.get_rank()
    some, all_by_gloo = dist.new_group([0, 2]), dist.new_group(backend="gloo")
    if rank != 1:
        assert dist.get_backend(some) == "shm"
        tensor = torch.full((5,), rank + 1.0)
        dist.broadcast(tensor, 2, group=some)
        dist.all_reduce(tensor, group=some)
        assert tensor.eq(6).all()
    tensor = torch.ones(3)
    dist.all_reduce(tensor, group=all_by_gloo)
    comm.all_reduce(tensor, group=all_by_gloo)
    assert tensor.eq(9).all()


@on_ranks(2)
def test_a_group_of_a_gloo_world_may_take_it():
    comm.register_shm()
    group = dist.new_group(backend="shm")
    assert isinstance(group, backend.SharedMemoryGroup)
    assert dist.get_backend() == "gloo"
    tensor = torch.ones(3)
    dist.all_reduce(tensor, group=group)
    assert tensor.eq(2).all()
    assert links_of(group)._calls == 1


@on_ranks(2, backend="shm")
def test_calls_by_either_name_are_numbered_together():
    links, group = links_of(None), dist.group.WORLD
    before = links._calls
    whole, product = torch.empty(4), {"op": dist.ReduceOp.PRODUCT}
    dist.all_gather_single(whole, torch.ones(2))
    comm.all_gather_single(whole, torch.ones(2))
    comm.barrier()
    dist.barrier()
    assert (links_of(group), links._calls) == (links, before + 4)
    for one in (comm, dist):  # by gloo, and told once
        one.all_reduce(whole, **product)
        one.reduce(whole, 0)
    assert links._calls == before + 8


@on_ranks(2, backend="shm")
def test_works_may_be_waited_for_in_any_order(monkeypatch):
    rank = dist.get_rank()

    def check(is_exchange):
        tensors = [torch.full((shared.SMALL + 1,), float(one)) for one in range(3)]
        works = [dist.all_reduce(one, async_op=True) for one in tensors]
        assert [isinstance(work._work, shared.SharedWork) for work in works] == [is_exchange] * 3
        for one in ((0, 1, 2), (2, 1, 0))[rank]:
            assert works[one].wait()
        assert [one.unique().tolist() for one in tensors] == [[0], [2], [4]]

    check(is_exchange=True)
    monkeypatch.setattr(shared, "FEW", 1)
    check(is_exchange=False)


@on_ranks(2, backend="shm")
def test_a_work_is_completed_when_its_data_is_there():
    calls = [
        lambda tensor: dist.all_reduce(tensor, async_op=True),
        lambda tensor: dist.broadcast(tensor.t(), 0, async_op=True),  # goes through a copy
    ]
    for call in calls:
        tensor = torch.full((2, 3), 1.0 - dist.get_rank())
        if dist.get_rank() == 0:
            time.sleep(0.2)
        work = call(tensor)
        if dist.get_rank() == 1:
            assert not work.is_completed()
        until = time.monotonic() + SOON
        while not work.is_completed() and time.monotonic() < until:
            time.sleep(0.01)
        assert tensor.eq(1).all()


@on_ranks(2, backend="shm")
def test_a_future_of_a_work_holds_its_tensors():
    tensor = torch.ones(3)
    work = dist.all_reduce(tensor, async_op=True)
    (found,) = work.get_future().wait()
    assert found.eq(2).all()
    assert work.result()[0] is tensor


@on_ranks(2, backend="shm")
def test_tensors_that_are_not_contiguous_go_to_gloo_or_through_a_copy():
    before = links_of(None)._calls
    transposed = torch.full((2, 3), dist.get_rank() + 1.0).t()
    dist.all_reduce(transposed)
    assert transposed.eq(3).all()
    assert links_of(None)._calls == before + 1  # peers are told
    tensor = torch.full((2, 6), float(dist.get_rank()))
    dist.broadcast(tensor[:, ::2], 1)
    assert tensor.tolist() == [[1, dist.get_rank()] * 3] * 2


@pytest.mark.parametrize("async_ops", [False, True], ids=["at once", "later"])
@on_ranks(2, backend="shm")
def test_coalesced_calls_are_made_one_after_the_other(async_ops):
    tensors = [torch.ones(3), torch.ones(shared.SMALL + 1)]
    wholes, chunks = [torch.empty(4), torch.empty(6)], [torch.full((2,), 1.0), torch.full((3,), 2.0)]
    calls = [
        lambda at: dist.all_reduce(tensors[at]),
        lambda at: dist.all_gather_single(wholes[at], chunks[at]),
        lambda at: dist.reduce_scatter_single(chunks[at], wholes[at]),
    ]
    with gloo_is_not_asked():
        for call in calls:
            with dist.distributed_c10d._coalescing_manager(async_ops=async_ops) as works:
                for at in range(2):
                    call(at)
            works.wait()
    assert [one.unique().tolist() for one in tensors] == [[2], [2]]
    assert [one.unique().tolist() for one in wholes] == [[1], [2]]
    assert [one.unique().tolist() for one in chunks] == [[2], [4]]


@on_ranks(2, backend="shm")
def test_functional_collectives_and_dtensors_take_it():
    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))
    whole = torch.arange(24.0).view(6, 4)
    one = distribute_tensor(whole, mesh, [Shard(0)])  # a scatter
    with gloo_is_not_asked():
        assert functional.all_reduce(torch.ones(3), "sum", dist.group.WORLD).eq(2).all()
        gathered = functional.all_gather_single(torch.full((2,), float(rank)), 0, dist.group.WORLD)
        assert gathered.tolist() == [0, 0, 1, 1]
        mine = functional.reduce_scatter_single(torch.arange(4.0), "avg", 0, dist.group.WORLD)
        assert mine.tolist() == [2.0 * rank, 2.0 * rank + 1]
        assert torch.equal(one.redistribute(mesh, [Replicate()]).to_local(), whole)
        assert torch.equal(one.redistribute(mesh, [Shard(1)]).to_local(), whole.chunk(2, 1)[rank])
        part = dist.tensor.DTensor.from_local(whole, mesh, [Partial()])
        assert torch.equal(part.redistribute(mesh, [Replicate()]).to_local(), 2 * whole)
        assert torch.equal(part.redistribute(mesh, [Shard(0)]).to_local(), 2 * whole.chunk(2)[rank])


def plain_training(steps: int) -> PlainTrainer:
    plain = PlainTrainer(make_toy(), lambda params: torch.optim.AdamW(params, lr=0.01))
    for step in range(steps):
        plain.step([toy_batch(step, 0, one) for one in range(dist.get_world_size())], toy_loss)
    return plain


def train(model: nn.Module, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(steps):
        toy_loss(model, toy_batch(step, 0, dist.get_rank())).backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    for mine, theirs in zip(found.parameters(), expected.parameters(), strict=True):
        whole = mine.full_tensor() if isinstance(mine, dist.tensor.DTensor) else mine
        torch.testing.assert_close(whole, theirs, rtol=1e-5, atol=1e-6)


def trained_by_ddp():
    model = DistributedDataParallel(make_toy(seed=dist.get_rank()), bucket_cap_mb=1e-4)
    assert_same(model.module, make_toy())  # rank 0's, by broadcast
    train(model, steps=3)
    assert_same(model.module, plain_training(steps=3).master)


@RANKS
def test_ddp_trains_like_plain_pytorch(ranks):
    run_on_ranks(ranks, trained_by_ddp, backend="shm")


@on_ranks(2, backend="shm")
def test_ddp_sums_sparse_gradients():
    table = nn.Embedding(4, 2, sparse=True)
    model = DistributedDataParallel(table)
    model(torch.tensor([dist.get_rank(), 3])).sum().backward()
    assert table.weight.grad.to_dense().tolist() == [[0.5, 0.5], [0.5, 0.5], [0, 0], [1, 1]]


@on_ranks(2, backend="shm")
def test_fsdp_trains_like_plain_pytorch():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(3)))
    plain = PlainTrainer(model, lambda params: torch.optim.AdamW(params, lr=0.01))
    for block in model:
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(3):
        batches = [
            torch.randn(2, 5, generator=torch.Generator().manual_seed(2 * step + one)) for one in range(2)
        ]
        plain.step(batches, squares)
        squares(model, batches[dist.get_rank()]).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_same(model, plain.master)


def squares(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).square().sum()


def trained_by_an_engine(stage):
    config = config_for(stage, "fp32", 1, 0.5)
    plain = PlainTrainer(
        make_toy(),
        lambda params: torch.optim.AdamW(params, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1),
        clip=0.5,
    )
    engine = deepspeed.initialize(model=make_toy(), config=config)[0]
    for step in range(3):
        plain.step([toy_batch(step, 0, one) for one in range(dist.get_world_size())], toy_loss, gas=1)
        drive_engine(engine, [toy_batch(step, 0, dist.get_rank())])
    assert_equal_training(engine, plain, 2e-6)
    engine.destroy()


@pytest.mark.parametrize(("ranks", "stage"), [(2, 0), (2, 2), (3, 2), (2, 3), (3, 3)])
def test_an_engine_trains_like_plain_pytorch(ranks, stage):
    run_on_ranks(ranks, trained_by_an_engine, stage, backend="shm")


@on_ranks(2, backend="shm")
def test_other_calls_of_the_ranks_are_an_error_on_both():
    group = dist.new_group()
    calls = [lambda: dist.all_reduce(torch.ones(3), group=group), lambda: dist.barrier(group=group)]
    with pytest.raises(CommunicationError, match=r"rank 0 is in all_reduce of 3 .*rank 1 is in barrier"):
        calls[dist.get_rank()]()


@on_ranks(2, backend="shm")
def test_a_late_rank_is_named_after_the_timeout_of_the_group():
    group = dist.new_group(timeout=timedelta(seconds=1))
    dist.barrier(group=group)
    if dist.get_rank() == 0:
        with pytest.raises(CommunicationError, match="rank 1 did not reach all_reduce"):
            dist.all_reduce(torch.ones(3), group=group)


def everything_with_rooms_or_without():
    comm.register_shm()
    group = dist.new_group(backend="shm")
    whole, chunk = torch.empty(4), torch.ones(2)
    for _ in range(2):
        dist.all_reduce(chunk, group=group)
        dist.all_gather_single(whole, chunk, group=group)
        dist.reduce_scatter_single(chunk, whole, group=group)
        dist.broadcast(chunk, 0, group=group)
        dist.all_to_all_single(whole, whole.clone(), group=group)
        dist.barrier(group=group)
    assert (whole.tolist(), chunk.tolist()) == ([8, 8, 8, 8], [16, 16])
    return links_of(group)


@on_ranks(2, backend="shm")
def test_without_shared_memory_on_one_rank_gloo_does_everything(monkeypatch):
    assert everything_with_rooms_or_without() is not None
    if dist.get_rank() == 1:
        monkeypatch.setenv(SWITCH, "0")
    assert everything_with_rooms_or_without() is None


def test_registering_again_is_harmless_and_changes_no_default():
    backend.register()
    assert dist.Backend.default_device_backend_map["cpu"] == "gloo"
    assert dist.is_backend_available("shm")


def test_a_second_backend_beside_it_is_refused():
    with pytest.raises(ConfigError, match=r"dist_backend: .*shm.*, got 'cpu:shm,cuda:nccl'"):
        deepspeed.init_distributed(dist_backend="cpu:shm,cuda:nccl")


def begins_again(rank, ports):
    descriptors = []
    for port, name in zip(ports, ("shm", "cpu:shm", "SHM"), strict=True):
        where = f"tcp://127.0.0.1:{port}"
        deepspeed.init_distributed(name, init_method=where, rank=rank, world_size=2, verbose=False)
        tensor = torch.ones(50_000)
        dist.all_reduce(tensor)
        assert tensor.eq(2).all()
        assert links_of(None) is not None
        dist.destroy_process_group()
        gc.collect()
        descriptors.append(len(os.listdir("/proc/self/fd")))
    assert descriptors[2] <= descriptors[1] + 2


def is_left_alone(rank, ports, *, after_a_call=True):
    where = f"tcp://127.0.0.1:{ports[0]}"
    dist.init_process_group("shm", init_method=where, rank=rank, world_size=2)
    if after_a_call:
        dist.barrier()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(3))


is_left_alone_before_the_first_call = partial(is_left_alone, after_a_call=False)


def waits_elsewhere(rank, ports):
    where = f"tcp://127.0.0.1:{ports[0]}"
    dist.init_process_group("shm", init_method=where, rank=rank, world_size=2)
    first, second = (dist.new_group() for _ in range(2))
    for group in (first, second):
        dist.barrier(group=group)
    watch()
    if rank == 0:
        dist.all_reduce(torch.ones(3), group=first)
    dist.barrier(group=second)


def run_case(case, folder) -> list[SimpleNamespace]:
    """Run a case on two real processes; return how each of them ended."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torch", "deepspeed.comm", __name__])
    ports = [free_port() for _ in range(3)]
    logs = [folder / f"{rank}.txt" for rank in range(2)]
    ranks = [context.Process(target=_rank, args=(case, rank, ports, str(logs[rank]))) for rank in range(2)]
    ends = run_to_their_end(ranks, logs, SOON)
    return [SimpleNamespace(code=code, said=said) for code, said in ends]


def _rank(case, rank, ports, log) -> None:
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stderr.reconfigure(line_buffering=True)
    torch.set_num_threads(1)
    comm.register_shm()
    case(rank, ports)


def test_it_ends_with_its_group_and_begins_again_under_each_of_its_names(tmp_path):
    for end in run_case(begins_again, tmp_path):
        assert end.code == 0, end.said


@pytest.mark.parametrize(
    ("case", "said"),
    [
        (is_left_alone, "rank 1 ended while rank 0 waited for it in all_reduce of 3"),
        (
            is_left_alone_before_the_first_call,
            "another rank ended or did not come while this one was in the first",
        ),
    ],
    ids=["later", "before"],
)
def test_a_rank_that_is_killed_is_missed_at_once(case, said, tmp_path):
    left, killed = run_case(case, tmp_path)
    assert killed.code == -signal.SIGKILL
    assert left.code == 1
    assert f"CommunicationError: {said}" in left.said


def test_ranks_that_wait_in_two_groups_for_each_other_say_so(tmp_path):
    for end in run_case(waits_elsewhere, tmp_path):
        assert end.code == 1
        assert "ranks wait for each other: rank 0 is in all_reduce of 3" in end.said
        assert "rank 1 is in barrier" in end.said


def test_the_future_of_a_call_by_gloo_is_not_waited_for(tmp_path):
    run_on_ranks(2, asks_for_a_future, tmp_path / "asked", backend="shm")


def asks_for_a_future(asked):
    tensor = torch.full((3,), 2.0)
    while dist.get_rank() == 1 and not asked.exists():
        time.sleep(0.01)
    work = dist.all_reduce(tensor, op=dist.ReduceOp.PRODUCT, async_op=True)
    future = work.get_future()
    if dist.get_rank() == 0:
        assert not future.done()
        asked.touch()
    future.wait()
    assert tensor.tolist() == [4, 4, 4]
