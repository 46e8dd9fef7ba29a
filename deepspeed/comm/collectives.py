"""The collectives that training stands on, under one name each: the only place that knows torch's old names.

torch 2.13 renamed ``all_gather_into_tensor`` and ``reduce_scatter_tensor`` to ``all_gather_single`` and
``reduce_scatter_single``. Tensors on the CPU in a gloo group take the faster way described in
note [direct exchange on gloo], whatever they are called. A `label` says what is moved, in errors about ranks
that do not agree; it is the same on all ranks, and so are the sizes. See note [Same call, same words].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepspeed.comm import direct, shared
from deepspeed.comm.calls import guarded, words
from deepspeed.comm.hosts import GatherAcross, ReduceAcross, hosts_for, hosts_of
from deepspeed.comm.links import links_of
from deepspeed.comm.log import logged, nbytes, total_nbytes
from deepspeed.comm.parts import cut, laid_out, numel_of
from deepspeed.comm.summing import is_reducible
from deepspeed.errors import UsageError

if hasattr(dist, "all_gather_single"):
    _torch_all_gather: Any = dist.all_gather_single
    _torch_reduce_scatter: Any = dist.reduce_scatter_single
else:
    _torch_all_gather = dist.all_gather_into_tensor
    _torch_reduce_scatter = dist.reduce_scatter_tensor


@logged("all_gather_single", lambda output, input, *_, **__: nbytes(output))
def all_gather_single(
    output: Tensor, input: Tensor, group: Any = None, async_op: bool = False, label: str = ""
) -> Any:
    """Fill `output` with every rank's `input`, in rank order.

    `output` holds world-size times as many elements as `input`, and may contain it at this rank's place.
    Returns a Work when `async_op`, else None.
    """
    return _all_gather(output, input, group, async_op, label, ordered=not async_op)


@logged("all_gather_single", lambda output, input, *_, **__: nbytes(output))
def start_all_gather(output: Tensor, input: Tensor, group: Any = None, label: str = "") -> Any:
    """Start to fill `output` with every rank's `input`, in rank order, and return a Work.

    Faster among hosts than an asynchronous `all_gather_single`, by the rule of `start_all_reduce`.

    Args:
        output: world-size times as many elements as `input`; may contain it at this rank's place.
        input: of the same dtype.
        group: of ranks.
        label: what is moved, in errors.
    """
    return _all_gather(output, input, group, True, label, ordered=True)


@logged("reduce_scatter_single", lambda output, input, *_, **__: nbytes(input))
def reduce_scatter_single(
    output: Tensor,
    input: Tensor,
    op: Any = dist.ReduceOp.SUM,
    group: Any = None,
    async_op: bool = False,
    label: str = "",
) -> Any:
    """Reduce every rank's `input` and leave this rank's chunk of the result in `output`.

    `input` holds world-size times as many elements as `output`. `output` may be this rank's chunk of
    `input`, and may have another dtype (fp32 for 16-bit input keeps the sum unrounded on CPU ranks).
    Returns a Work when `async_op`, else None.
    """
    return _reduce_scatter(output, input, op, group, async_op, label)


@logged("all_reduce", lambda tensor, *_, **__: nbytes(tensor))
def all_reduce(
    tensor: Tensor,
    op: Any = dist.ReduceOp.SUM,
    group: Any = None,
    async_op: bool = False,
    label: str = "",
) -> Any:
    """Reduce `tensor` over the ranks of `group`, in place; returns a Work when `async_op`, else None."""
    what = words("all_reduce", tensor.numel(), tensor.dtype, label)
    shares, large = _shares_memory(tensor, op, group), tensor.numel() > shared.SMALL
    if shares and large and not async_op:
        return complete(_reduce_everywhere(tensor.view(-1), [tensor.view(-1)], op, group, what), async_op)
    links = links_of(group) if shares else None
    if links is None or (large and links.size > shared.FEW):
        return by_torch(what, group, dist.all_reduce, tensor, op=op, async_op=async_op)
    return complete(shared.SumWhole(links, tensor.view(-1), op, what), async_op)


@logged("reduce_scatter_single", lambda output, parts, *_, **__: numel_of(parts) * output.element_size())
def start_reduce_scatter(output: Tensor, parts: Sequence[Tensor], group: Any = None, label: str = "") -> Any:
    """Start to sum every rank's message and leave this rank's chunk of the sum in `output`; return a Work.

    Args:
        output: flat; its dtype is that of the message.
        parts: of this rank's message, flat, of any dtype; in all world-size times as many elements as `output`.
        group: of ranks.
        label: what is moved, in errors.
    """
    op = dist.ReduceOp.SUM
    if not _shares_memory(output, op, group):
        whole = laid_out(parts, output.new_empty(numel_of(parts)))
        work = _reduce_scatter(output, whole, op, group, True, label)
        return direct.DeferredWork([work], b"", group, used=[whole])
    what = words("reduce_scatter_single", numel_of(parts), output.dtype, label)
    chunks = cut(parts, [output.numel()] * dist.get_world_size(group))
    return _reduce(output, chunks, op, group, what, output.dtype, ordered=True)


@logged("all_reduce", lambda tensor, *_, **__: nbytes(tensor))
def start_all_reduce(
    tensor: Tensor,
    parts: Sequence[Tensor] = (),
    op: Any = dist.ReduceOp.SUM,
    group: Any = None,
    label: str = "",
) -> Any:
    """Start to reduce a message over the ranks of `group` into `tensor`, and return a Work.

    Faster than an asynchronous `all_reduce` between ranks of one host, for callers that keep a stricter
    rule: waiting counts as a collective, so all ranks start and wait in the same order.

    Args:
        tensor: gets the result; its dtype is that of the message.
        parts: of this rank's message, flat, of any dtype; none: what `tensor` has.
        op: of the reduction.
        group: of ranks.
        label: what is moved, in errors.
    """
    what, flat = words("all_reduce", tensor.numel(), tensor.dtype, label), tensor.view(-1)
    shares = _shares_memory(tensor, op, group)
    if shares and flat.numel() > shared.SMALL:
        return _reduce_everywhere(flat, parts or [flat], op, group, what)
    if parts:
        laid_out(parts, flat)
    links = links_of(group) if shares else None
    if links is None:
        return by_torch(what, group, dist.all_reduce, tensor, op=op, async_op=True)
    return shared.SumWhole(links, flat, op, what)


@logged("all_gather", lambda outputs, *_, **__: total_nbytes(outputs))
def all_gather(outputs: Sequence[Tensor], input: Tensor, group: Any = None, async_op: bool = False) -> Any:
    """Fill `outputs`, one tensor per rank, from every rank's `input`."""
    if not direct.is_direct(group, input, *outputs) or any(one.shape != input.shape for one in outputs):
        return by_torch(words("all_gather"), group, dist.all_gather, list(outputs), input, async_op=async_op)
    chunks, what = [one.view(-1) for one in outputs], words("all_gather", input.numel(), input.dtype)
    return complete(_gather(chunks, input.view(-1), group, what, ordered=not async_op), async_op)


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
        what = words("reduce_scatter")
        return by_torch(what, group, dist.reduce_scatter, output, list(inputs), op=op, async_op=async_op)
    chunks, what = [[one.view(-1)] for one in inputs], words("reduce_scatter", output.numel(), output.dtype)
    work = _reduce(output.view(-1), chunks, op, group, what, output.dtype, ordered=not async_op)
    return complete(work, async_op)


def _shares_memory(tensor: Tensor, op: Any, group: Any) -> bool:
    """Tell whether ranks that share memory reduce such tensors through it, on one host or on several."""
    if not direct.is_direct(group, tensor) or not is_reducible(tensor.dtype, op):
        return False
    return links_of(group) is not None or hosts_for(tensor.dtype, op, group) is not None


def by_torch(what: bytes, group: Any, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a collective of torch's over all ranks of `group`, after telling linked peers that it is due.

    Args:
        what: its words.
        group: of ranks.
        function: torch's; gets `group` too.
        args: its arguments; peers are told where the first one is a tensor on the host.
        kwargs: more of them.
    """
    tensor = next((one for one in args if isinstance(one, Tensor)), None)
    links = links_of(group) if tensor is not None and direct.is_on_host(group, tensor) else None
    if links is not None:
        links.note(what)
    start = partial(function, *args, group=group, **kwargs)
    return guarded(what, start, None if links is None else links.drain)


def _all_gather(
    output: Tensor, input: Tensor, group: Any, async_op: bool, label: str, *, ordered: bool
) -> Any:
    what = words("all_gather_single", input.numel(), input.dtype, label)
    if not direct.is_direct(group, output, input) or output.dtype != input.dtype:
        return by_torch(what, group, _torch_all_gather, output, input, async_op=async_op)
    chunks = _chunks("all_gather_single", output, input, group)
    return complete(_gather(chunks, input.view(-1), group, what, ordered=ordered), async_op)


@torch.no_grad()
def _gather(chunks: Sequence[Tensor], mine: Tensor, group: Any, what: bytes, *, ordered: bool) -> Any:
    """Start to fill a flat tensor from each rank; `ordered`: all ranks wait for it in the same order."""
    own = chunks[dist.get_rank(group)]
    if own.data_ptr() != mine.data_ptr():
        own.copy_(mine)
    links, hosts = links_of(group), hosts_of(group)
    if links is not None:
        return shared.Gather(links, [[chunk] for chunk in chunks], what)
    if hosts is not None and ordered:
        return GatherAcross(hosts, chunks, group, what)
    return direct.gather(chunks, direct.Peers.all_of(group), what)


def _reduce(
    output: Tensor,
    chunks: Sequence[Sequence[Tensor]],
    op: Any,
    group: Any,
    what: bytes,
    dtype: torch.dtype,
    *,
    ordered: bool,
) -> Any:
    """Start to reduce what each rank has, in parts, into this rank's `output`; `dtype` is that of the message."""
    links, hosts = links_of(group), hosts_for(dtype, op, group)
    if links is not None:
        return shared.Reduce(links, output, chunks, op, what, dtype)
    if hosts is not None and ordered:
        return ReduceAcross(hosts, output, chunks, op, group, what, dtype)
    whole, peers = [parts[0] for parts in chunks], direct.Peers.all_of(group)
    return direct.ReduceWork(output, whole, op, peers, at_once=not ordered, what=what)


def _reduce_everywhere(output: Tensor, parts: Sequence[Tensor], op: Any, group: Any, what: bytes) -> Any:
    """Start to reduce a message in parts into every rank's `output` (flat), a chunk on each rank first."""
    chunks, me = output.tensor_split(dist.get_world_size(group)), dist.get_rank(group)
    pieces = cut(parts, [chunk.numel() for chunk in chunks])
    work = _reduce(chunks[me], pieces, op, group, what, output.dtype, ordered=True)
    return shared.ReduceEverywhere(work, partial(_gather, chunks, chunks[me], group, what, ordered=True))


def _reduce_scatter(output: Tensor, input: Tensor, op: Any, group: Any, async_op: bool, label: str) -> Any:
    what = words("reduce_scatter_single", input.numel(), input.dtype, label)
    if not direct.is_direct(group, output, input) or not is_reducible(input.dtype, op):
        return _reduce_scatter_by_torch(output, input, op, group, async_op, what)
    chunks = [[chunk] for chunk in _chunks("reduce_scatter_single", input, output, group)]
    work = _reduce(output.view(-1), chunks, op, group, what, input.dtype, ordered=not async_op)
    return complete(work, async_op)


def _reduce_scatter_by_torch(
    output: Tensor, input: Tensor, op: Any, group: Any, async_op: bool, what: bytes
) -> Any:
    same = output.dtype == input.dtype
    received = output if same else torch.empty_like(output, dtype=input.dtype)
    work = by_torch(what, group, _torch_reduce_scatter, received, input, op=op, async_op=async_op)
    if same:
        return work

    def convert() -> None:
        output.copy_(received)

    if work is not None:
        return direct.DeferredWork([work], what, group, convert)
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


def complete(work: Any, async_op: bool) -> Any:
    """Wait for a work, or return it."""
    if async_op:
        return work
    work.wait()
    return None
