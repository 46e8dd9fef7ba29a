"""The collectives that training stands on, under one name each: the only place that knows torch's old names.

torch 2.13 renamed ``all_gather_into_tensor`` and ``reduce_scatter_tensor`` to ``all_gather_single`` and
``reduce_scatter_single``. Tensors on the CPU in a gloo group take the faster way described in
note [direct exchange on gloo], whatever they are called.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepspeed.comm import direct, shared
from deepspeed.comm.links import Links, links_of
from deepspeed.comm.log import logged, nbytes, total_nbytes
from deepspeed.comm.summing import is_reducible
from deepspeed.errors import UsageError

if hasattr(dist, "all_gather_single"):
    _torch_all_gather: Any = dist.all_gather_single
    _torch_reduce_scatter: Any = dist.reduce_scatter_single
else:
    _torch_all_gather = dist.all_gather_into_tensor
    _torch_reduce_scatter = dist.reduce_scatter_tensor


@logged("all_gather_single", lambda output, input, *_, **__: nbytes(output))
def all_gather_single(output: Tensor, input: Tensor, group: Any = None, async_op: bool = False) -> Any:
    """Fill `output` with every rank's `input`, in rank order.

    `output` holds world-size times as many elements as `input`, and may contain it at this rank's place.
    Returns a Work when `async_op`, else None.
    """
    if not direct.is_direct(group, output, input) or output.dtype != input.dtype:
        return _torch_all_gather(output, input, group=group, async_op=async_op)
    chunks = _chunks("all_gather_single", output, input, group)
    return _complete(_gather(chunks, input.view(-1), group), async_op)


@logged("reduce_scatter_single", lambda output, input, *_, **__: nbytes(input))
def reduce_scatter_single(
    output: Tensor, input: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
) -> Any:
    """Reduce every rank's `input` and leave this rank's chunk of the result in `output`.

    `input` holds world-size times as many elements as `output`. `output` may be this rank's chunk of
    `input`, and may have another dtype (fp32 for 16-bit input keeps the sum unrounded on CPU ranks).
    Returns a Work when `async_op`, else None.
    """
    if not direct.is_direct(group, output, input) or not is_reducible(input.dtype, op):
        return _reduce_scatter_by_torch(output, input, op, group, async_op)
    chunks = _chunks("reduce_scatter_single", input, output, group)
    return _complete(_reduce(output.view(-1), chunks, op, group, async_op), async_op)


@logged("all_reduce", lambda tensor, *_, **__: nbytes(tensor))
def all_reduce(tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False) -> Any:
    """Reduce `tensor` over the ranks of `group`, in place; returns a Work when `async_op`, else None."""
    links = _links_for(tensor, op, group)
    if links is not None and tensor.numel() <= shared.SMALL:
        return _complete(shared.SumWhole(links, tensor.view(-1), op), async_op)
    return dist.all_reduce(tensor, op=op, group=group, async_op=async_op)


@logged("all_reduce", lambda tensor, *_, **__: nbytes(tensor))
def start_all_reduce(tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None) -> Any:
    """Start to reduce `tensor` over the ranks of `group`, in place, and return a Work.

    Faster than an asynchronous `all_reduce` between ranks of one host, for callers that keep a stricter
    rule: waiting counts as a collective, so all ranks start and wait in the same order.
    """
    links = _links_for(tensor, op, group)
    if links is None:
        return dist.all_reduce(tensor, op=op, group=group, async_op=True)
    kind = shared.SumWhole if tensor.numel() <= shared.SMALL else shared.ReduceEverywhere
    return kind(links, tensor.view(-1), op)


@logged("all_gather", lambda outputs, *_, **__: total_nbytes(outputs))
def all_gather(outputs: Sequence[Tensor], input: Tensor, group: Any = None, async_op: bool = False) -> Any:
    """Fill `outputs`, one tensor per rank, from every rank's `input`."""
    if not direct.is_direct(group, input, *outputs) or any(one.shape != input.shape for one in outputs):
        return dist.all_gather(list(outputs), input, group=group, async_op=async_op)
    chunks = [one.view(-1) for one in outputs]
    return _complete(_gather(chunks, input.view(-1), group), async_op)


@logged("reduce_scatter", lambda output, inputs, *_, **__: total_nbytes(inputs))
def reduce_scatter(
    output: Tensor,
    inputs: Sequence[Tensor],
    op: Any = dist.ReduceOp.SUM,
    group: Any = None,
    async_op: bool = False,
) -> Any:
    """Reduce `inputs`, one tensor per rank, and leave this rank's in `output`."""
    uneven = any(one.shape != output.shape for one in inputs)
    if uneven or not direct.is_direct(group, output, *inputs) or not is_reducible(output.dtype, op):
        return dist.reduce_scatter(output, list(inputs), op=op, group=group, async_op=async_op)
    chunks = [one.view(-1) for one in inputs]
    return _complete(_reduce(output.view(-1), chunks, op, group, async_op), async_op)


def _links_for(tensor: Tensor, op: Any, group: Any) -> Links | None:
    return links_of(group) if direct.is_direct(group, tensor) and is_reducible(tensor.dtype, op) else None


def _gather(chunks: Sequence[Tensor], mine: Tensor, group: Any) -> Any:
    links = links_of(group)
    return direct.gather(chunks, mine, group) if links is None else shared.Gather(links, chunks, mine)


def _reduce(output: Tensor, chunks: Sequence[Tensor], op: Any, group: Any, async_op: bool) -> Any:
    links = links_of(group)
    if links is None:
        return direct.ReduceWork(output, chunks, op, group, at_once=async_op)
    return shared.Reduce(links, output, chunks, op)


def _reduce_scatter_by_torch(output: Tensor, input: Tensor, op: Any, group: Any, async_op: bool) -> Any:
    if output.dtype == input.dtype:
        return _torch_reduce_scatter(output, input, op=op, group=group, async_op=async_op)
    received = torch.empty_like(output, dtype=input.dtype)
    work = _torch_reduce_scatter(received, input, op=op, group=group, async_op=async_op)

    def convert() -> None:
        output.copy_(received)

    if work is not None:
        return direct.DeferredWork([work], convert)
    convert()
    return None


def _chunks(name: str, whole: Tensor, part: Tensor, group: Any) -> tuple[Tensor, ...]:
    """Cut `whole` into one flat chunk of `part`'s size per rank."""
    world = dist.get_world_size(group)
    if whole.numel() != part.numel() * world:
        raise UsageError(
            f"{name}: expected {world} (ranks) x {part.numel()} elements, got {whole.numel()}; "
            "pad the tensor to a multiple of the number of ranks"
        )
    return whole.view(-1).chunk(world) if part.numel() else (whole.view(-1),) * world


def _complete(work: Any, async_op: bool) -> Any:
    if async_op:
        return work
    work.wait()
    return None
