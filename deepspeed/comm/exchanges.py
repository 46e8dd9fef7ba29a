"""Which exchange a collective is, under whatever name it is called.

The functions named like collectives start one over the ranks of `group` between tensors on the host and return its
Work, or None where it has none for these tensors: then the caller asks torch's own backend. `what` is the words
of the call (note [Same call, same words]). `ordered`: all ranks wait for the work in the same order among others,
because they wait at once, or promise it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepspeed.comm import direct, shared
from deepspeed.comm.calls import guarded
from deepspeed.comm.hosts import GatherAcross, ReduceAcross, hosts_for, hosts_of
from deepspeed.comm.links import Links
from deepspeed.comm.neighbours import links_of
from deepspeed.comm.parts import cut, laid_out
from deepspeed.comm.summing import is_reducible
from deepspeed.errors import UsageError


def all_gather_single(group: Any, output: Tensor, input: Tensor, what: bytes, *, ordered: bool) -> Any:
    """Fill `output` with every rank's `input`."""
    if not direct.is_direct(group, output, input) or output.dtype != input.dtype:
        return None
    chunks = _chunks("all_gather_single", output, input, group)
    return _gather(group, chunks, input.view(-1), what, ordered=ordered)


def all_gather(group: Any, outputs: Sequence[Tensor], input: Tensor, what: bytes, *, ordered: bool) -> Any:
    """Fill `outputs`, one tensor per rank, from every rank's `input`."""
    if not direct.is_direct(group, input, *outputs) or any(one.shape != input.shape for one in outputs):
        return None
    return _gather(group, [one.view(-1) for one in outputs], input.view(-1), what, ordered=ordered)


def reduce_scatter_single(
    group: Any, output: Tensor, input: Tensor, op: Any, what: bytes, *, ordered: bool
) -> Any:
    """Leave this rank's chunk of the reduced `input` in `output`, which may have another dtype."""
    if not direct.is_direct(group, output, input) or not is_reducible(input.dtype, op):
        return None
    chunks = [[chunk] for chunk in _chunks("reduce_scatter_single", input, output, group)]
    return _reduce(group, output.view(-1), chunks, op, what, input.dtype, ordered=ordered)


def reduce_scatter(
    group: Any, output: Tensor, inputs: Sequence[Tensor], op: Any, what: bytes, *, ordered: bool
) -> Any:
    """Reduce `inputs`, one tensor per rank, and leave this rank's in `output`."""
    uneven = any(one.shape != output.shape for one in inputs)
    if uneven or not direct.is_direct(group, output, *inputs) or not is_reducible(output.dtype, op):
        return None
    chunks = [[one.view(-1)] for one in inputs]
    return _reduce(group, output.view(-1), chunks, op, what, output.dtype, ordered=ordered)


def reduce_scatter_parts(group: Any, output: Tensor, parts: Sequence[Tensor], op: Any, what: bytes) -> Any:
    """Leave this rank's chunk of a reduced message in parts in `output` (flat), by an ordered exchange."""
    if not _shares_memory(group, output, op):
        return None
    chunks = cut(parts, [output.numel()] * dist.get_world_size(group))
    return _reduce(group, output, chunks, op, what, output.dtype, ordered=True)


def all_reduce(
    group: Any, tensor: Tensor, op: Any, what: bytes, *, ordered: bool, parts: Sequence[Tensor] = ()
) -> Any:
    """Reduce a message into `tensor`: what is in `parts`, or what the tensor has."""
    if not _shares_memory(group, tensor, op):
        return None
    flat, links = tensor.view(-1), links_of(group)
    large = flat.numel() > shared.SMALL
    if large and ordered:
        return _reduce_everywhere(group, flat, parts or [flat], op, what)
    if links is None or (large and links.size > shared.FEW):
        return None
    if parts:
        laid_out(parts, flat)
    return shared.SumWhole(links, flat, op, what)


def broadcast(group: Any, tensor: Tensor, src: int, async_op: bool, what: bytes) -> Any:
    """Copy the tensor of global rank `src` to every rank."""
    links = links_of(group) if direct.is_on_host(group, tensor) else None
    if links is None:
        return None
    everyone: Any = dist.group.WORLD
    source = dist.get_group_rank(everyone if group is None else group, src)
    with torch.no_grad():
        return _broadcast(links, tensor.detach(), source, group, what, async_op)


def all_to_all_single(
    group: Any,
    output: Tensor,
    input: Tensor,
    output_rows: Sequence[int] | None,
    input_rows: Sequence[int] | None,
    what: bytes,
) -> Any:
    """Send so many rows of `input` to each rank and collect theirs in `output`; no numbers: equally many."""
    links = None
    if direct.is_direct(group, output, input) and output.dtype == input.dtype and output.dim() > 0:
        links = links_of(group)
    if links is None:
        return None
    received = _chunks_of(output, output_rows, links.size, "output")
    sent = _chunks_of(input, input_rows, links.size, "input")
    return shared.Exchange(links, received, sent, what)


def all_to_all(group: Any, outputs: Sequence[Tensor], inputs: Sequence[Tensor], what: bytes) -> Any:
    """Send one tensor of `inputs` to each rank and collect theirs in `outputs`."""
    dtypes = {one.dtype for one in (*outputs, *inputs)}
    links = links_of(group) if direct.is_direct(group, *outputs, *inputs) and len(dtypes) == 1 else None
    if links is None or not len(outputs) == len(inputs) == links.size:
        return None
    received, sent = [_flat(one) for one in outputs], [_flat(one) for one in inputs]
    return shared.Exchange(links, received, sent, what)


def barrier(group: Any, what: bytes) -> Any:
    """Wait until every rank of `group` is here."""
    links = links_of(group) if direct.is_on_host(group) else None
    if links is None:
        return None
    return shared.SumWhole(links, torch.zeros(1, device="cpu"), dist.ReduceOp.SUM, what)


def elsewhere(what: bytes, group: Any, links: Links | None, start: Callable[[], Any]) -> Any:
    """Make a call of all ranks that torch's own backend serves, after telling linked peers that it is due.

    Args:
        what: its words.
        group: of ranks; read from here by what looks for a standstill.
        links: of the peers who are told.
        start: makes it.
    """
    if links is not None:
        links.note(what)
    return guarded(what, start, None if links is None else links.drain)


def _shares_memory(group: Any, tensor: Tensor, op: Any) -> bool:
    """Tell whether ranks that share memory reduce such tensors through it, on one host or on several."""
    if not direct.is_direct(group, tensor) or not is_reducible(tensor.dtype, op):
        return False
    return links_of(group) is not None or hosts_for(group, tensor.dtype, op) is not None


@torch.no_grad()
def _gather(group: Any, chunks: Sequence[Tensor], mine: Tensor, what: bytes, *, ordered: bool) -> Any:
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
    group: Any,
    output: Tensor,
    chunks: Sequence[Sequence[Tensor]],
    op: Any,
    what: bytes,
    dtype: torch.dtype,
    *,
    ordered: bool,
) -> Any:
    """Reduce this rank's of `chunks`, in parts; `dtype` is that of the message."""
    links, hosts = links_of(group), hosts_for(group, dtype, op)
    if links is not None:
        return shared.Reduce(links, output, chunks, op, what, dtype)
    if hosts is not None and ordered:
        return ReduceAcross(hosts, output, chunks, op, group, what, dtype)
    whole, peers = [parts[0] for parts in chunks], direct.Peers.all_of(group)
    return direct.ReduceWork(output, whole, op, peers, at_once=not ordered, what=what)


def _reduce_everywhere(group: Any, output: Tensor, parts: Sequence[Tensor], op: Any, what: bytes) -> Any:
    """Reduce a message in parts into every rank's `output` (flat), a chunk on each rank first."""
    chunks, me = output.tensor_split(dist.get_world_size(group)), dist.get_rank(group)
    pieces = cut(parts, [chunk.numel() for chunk in chunks])
    work = _reduce(group, chunks[me], pieces, op, what, output.dtype, ordered=True)
    gather = partial(_gather, group, chunks, chunks[me], what, ordered=True)
    return shared.ReduceEverywhere(work, gather)


def _chunks(name: str, whole: Tensor, part: Tensor, group: Any) -> tuple[Tensor, ...]:
    """Cut `whole` into one flat chunk of `part`'s size per rank."""
    world = dist.get_world_size(group)
    if whole.numel() != part.numel() * world:
        raise UsageError(
            f"{name}: expected {world} (ranks) x {part.numel()} elements, got {whole.numel()}; "
            "pad the tensor to a multiple of the number of ranks"
        )
    return whole.view(-1).chunk(world) if part.numel() else (whole.view(-1),) * world


def stored(tensor: Tensor) -> Tensor:
    """Return the elements that an expanded tensor has in memory, once each: what a broadcast moves."""
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[dim] > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def _broadcast(links: Links, tensor: Tensor, source: int, group: Any, what: bytes, async_op: bool) -> Any:
    """Copy through rooms, piece by piece; the source is one piece ahead of the others, or all where nobody waits."""
    flat = tensor.contiguous().view(-1)
    pending = []
    for piece in flat.split(max(1, shared.PIECE // flat.itemsize, -(-len(flat) // shared.PIECES))):
        pending.append(shared.Broadcast(links, piece, source, what))
        if not async_op:
            pending.pop().wait()

    def put_back() -> None:
        tensor.copy_(flat.view(tensor.shape))

    apart = flat.data_ptr() != tensor.data_ptr()
    return direct.DeferredWork(pending, what, group, put_back if apart else None)


def _flat(tensor: Tensor) -> Tensor:
    """View a contiguous tensor as one row; `view` keeps an odd stride where there is one element or none."""
    return tensor.as_strided((tensor.numel(),), (1,))


def _chunks_of(tensor: Tensor, rows: Sequence[int] | None, world: int, name: str) -> Sequence[Tensor]:
    """Cut a tensor into flat chunks of so many rows for each rank, or equal ones."""
    length = tensor.shape[0]
    if not rows and length % world == 0:
        rows = [length // world] * world
    if not rows or len(rows) != world or sum(rows) != length:
        raise UsageError(
            f"all_to_all_single: expected {name}_split_sizes for {world} ranks that add up to the {length} rows of "
            f"{name}, got {list(rows or [])}; without them the rows are shared equally, if they can be"
        )
    width = tensor.numel() // length if length else 0
    chunks: Sequence[Tensor] = _flat(tensor).split([one * width for one in rows])
    return chunks
