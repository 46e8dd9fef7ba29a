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

from deepspeed.comm import direct, exchanges
from deepspeed.comm.calls import words
from deepspeed.comm.log import logged, nbytes, total_nbytes
from deepspeed.comm.neighbours import links_of
from deepspeed.comm.parts import laid_out, numel_of

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
    work = exchanges.all_reduce(group, tensor, op, what, ordered=not async_op)
    if work is None:
        return by_torch(what, group, dist.all_reduce, tensor, op=op, async_op=async_op)
    return complete(work, async_op)


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
    what = words("reduce_scatter_single", numel_of(parts), output.dtype, label)
    work = exchanges.reduce_scatter_parts(group, output, parts, op, what)
    if work is not None:
        return work
    whole = laid_out(parts, output.new_empty(numel_of(parts)))
    work = _reduce_scatter(output, whole, op, group, True, label)
    return direct.DeferredWork([work], b"", group, used=[whole])


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
    what = words("all_reduce", tensor.numel(), tensor.dtype, label)
    work = exchanges.all_reduce(group, tensor, op, what, ordered=True, parts=parts)
    if work is not None:
        return work
    if parts:
        laid_out(parts, tensor.view(-1))
    return by_torch(what, group, dist.all_reduce, tensor, op=op, async_op=True)


@logged("all_gather", lambda outputs, *_, **__: total_nbytes(outputs))
def all_gather(outputs: Sequence[Tensor], input: Tensor, group: Any = None, async_op: bool = False) -> Any:
    """Fill `outputs`, one tensor per rank, from every rank's `input`."""
    what = words("all_gather", input.numel(), input.dtype)
    work = exchanges.all_gather(group, outputs, input, what, ordered=not async_op)
    if work is None:
        return by_torch(words("all_gather"), group, dist.all_gather, list(outputs), input, async_op=async_op)
    return complete(work, async_op)


@logged("reduce_scatter", lambda output, inputs, *_, **__: total_nbytes(inputs))
def reduce_scatter(
    output: Tensor,
    inputs: Sequence[Tensor],
    op: Any = dist.ReduceOp.SUM,
    group: Any = None,
    async_op: bool = False,
) -> Any:
    """Reduce `inputs`, one tensor per rank, and leave this rank's in `output`."""
    what = words("reduce_scatter", output.numel(), output.dtype)
    work = exchanges.reduce_scatter(group, output, inputs, op, what, ordered=not async_op)
    if work is None:
        what = words("reduce_scatter")  # sizes may differ between ranks
        return by_torch(what, group, dist.reduce_scatter, output, list(inputs), op=op, async_op=async_op)
    return complete(work, async_op)


def by_torch(what: bytes, group: Any, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a collective of torch's over all ranks of `group`, after telling linked peers that it is due.

    Args:
        what: its words.
        group: of ranks.
        function: torch's; gets `group` too.
        args: its arguments; peers are told where the first one is a tensor on the host, unless torch's
            function tells them itself.
        kwargs: more of them.
    """
    tensor = next((one for one in args if isinstance(one, Tensor)), None)
    tells = tensor is not None and direct.is_on_host(group, tensor) and not direct.is_shared(group)
    start = partial(function, *args, group=group, **kwargs)
    return exchanges.elsewhere(what, group, links_of(group) if tells else None, start)


def _all_gather(
    output: Tensor, input: Tensor, group: Any, async_op: bool, label: str, *, ordered: bool
) -> Any:
    what = words("all_gather_single", input.numel(), input.dtype, label)
    work = exchanges.all_gather_single(group, output, input, what, ordered=ordered)
    if work is None:
        return by_torch(what, group, _torch_all_gather, output, input, async_op=async_op)
    return complete(work, async_op)


def _reduce_scatter(output: Tensor, input: Tensor, op: Any, group: Any, async_op: bool, label: str) -> Any:
    what = words("reduce_scatter_single", input.numel(), input.dtype, label)
    work = exchanges.reduce_scatter_single(group, output, input, op, what, ordered=not async_op)
    if work is None:
        return _reduce_scatter_by_torch(output, input, op, group, async_op, what)
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


def complete(work: Any, async_op: bool) -> Any:
    """Wait for a work, or return it."""
    if async_op:
        return work
    work.wait()
    return None
