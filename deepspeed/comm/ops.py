"""The rest of ``torch.distributed`` under ``deepspeed.comm`` with the same arguments, counted likewise."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from deepspeed.accelerator import get_accelerator
from deepspeed.comm import direct, shared
from deepspeed.comm.calls import words
from deepspeed.comm.collectives import by_torch, complete
from deepspeed.comm.links import Links, links_of
from deepspeed.comm.log import logged, nbytes, total_nbytes
from deepspeed.errors import UsageError


def get_local_rank() -> int:
    """Return this process's rank on its machine: LOCAL_RANK, else 0."""
    return int(os.environ.get("LOCAL_RANK") or 0)


def get_all_ranks_from_group(group: Any = None) -> list[int]:
    """Return the global ranks of `group`, in the group's order."""
    return dist.get_process_group_ranks(group)


def get_world_group() -> Any:
    """Return the group of all ranks."""
    return dist.group.WORLD


def initialize_mesh_device(mesh_shape: tuple[int, ...], mesh_dim_names: tuple[str, ...]) -> Any:
    """Return a torch DeviceMesh over all ranks, on the current device type."""
    return init_device_mesh(
        get_accelerator().device_name(), tuple(mesh_shape), mesh_dim_names=tuple(mesh_dim_names)
    )


@logged("broadcast", lambda tensor, *_, **__: nbytes(tensor))
def broadcast(tensor: Tensor, src: int, group: Any = None, async_op: bool = False, label: str = "") -> Any:
    """Send `tensor` from global rank `src` to every rank of `group`; `label` names it in errors."""
    what = words(f"broadcast from rank {src}", tensor.numel(), tensor.dtype, label)
    tensor = _stored(tensor)
    links = links_of(group) if direct.is_on_host(group, tensor) else None
    if links is None:
        return by_torch(what, group, dist.broadcast, tensor, src, async_op=async_op)
    everyone: Any = dist.group.WORLD
    source = dist.get_group_rank(everyone if group is None else group, src)
    with torch.no_grad():
        return _broadcast(links, tensor.detach(), source, group, what, async_op)


def _stored(tensor: Tensor) -> Tensor:
    """Return the elements that an expanded tensor has in memory, once each."""
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
    return complete(direct.DeferredWork(pending, what, group, put_back if apart else None), async_op)


@logged("reduce", lambda tensor, *_, **__: nbytes(tensor))
def reduce(
    tensor: Tensor, dst: int, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
) -> Any:
    """Reduce `tensor` into global rank `dst`."""
    what = words(f"reduce to rank {dst}", tensor.numel(), tensor.dtype)
    return by_torch(what, group, dist.reduce, tensor, dst, op=op, async_op=async_op)


@logged("all_to_all_single", lambda output, input, *_, **__: nbytes(input))
def all_to_all_single(
    output: Tensor,
    input: Tensor,
    output_split_sizes: list[int] | None = None,
    input_split_sizes: list[int] | None = None,
    group: Any = None,
    async_op: bool = False,
) -> Any:
    """Send a chunk of `input` to each rank and collect theirs in `output`."""
    what, sizes = words("all_to_all_single"), (output_split_sizes, input_split_sizes)
    links = (
        links_of(group) if direct.is_direct(group, output, input) and output.dtype == input.dtype else None
    )
    if links is None or output.dim() == 0:
        return by_torch(what, group, dist.all_to_all_single, output, input, *sizes, async_op=async_op)
    received = _chunks_of(output, output_split_sizes, links.size, "output")
    sent = _chunks_of(input, input_split_sizes, links.size, "input")
    return complete(shared.Exchange(links, received, sent, what), async_op)


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
    chunks: Sequence[Tensor] = tensor.view(-1).split([one * width for one in rows])
    return chunks


@logged("all_to_all", lambda outputs, inputs, *_, **__: total_nbytes(inputs))
def all_to_all(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], group: Any = None, async_op: bool = False
) -> Any:
    """Send one tensor of `inputs` to each rank and collect theirs in `outputs`."""
    what, dtypes = words("all_to_all"), {one.dtype for one in (*outputs, *inputs)}
    links = links_of(group) if direct.is_direct(group, *outputs, *inputs) and len(dtypes) == 1 else None
    if links is not None and len(outputs) == len(inputs) == links.size:
        sent = [one.view(-1) for one in inputs]
        return complete(shared.Exchange(links, [one.view(-1) for one in outputs], sent, what), async_op)
    return by_torch(what, group, dist.all_to_all, list(outputs), list(inputs), async_op=async_op)


@logged("gather", lambda tensor, *_, **__: nbytes(tensor))
def gather(
    tensor: Tensor,
    gather_list: list[Tensor] | None = None,
    dst: int = 0,
    group: Any = None,
    async_op: bool = False,
) -> Any:
    """Collect every rank's `tensor` on global rank `dst`."""
    what = words(f"gather to rank {dst}")
    return by_torch(what, group, dist.gather, tensor, gather_list, dst=dst, async_op=async_op)


@logged("scatter", lambda tensor, *_, **__: nbytes(tensor))
def scatter(
    tensor: Tensor,
    scatter_list: list[Tensor] | None = None,
    src: int = 0,
    group: Any = None,
    async_op: bool = False,
) -> Any:
    """Give each rank its tensor of `scatter_list` on global rank `src`."""
    what = words(f"scatter from rank {src}")
    return by_torch(what, group, dist.scatter, tensor, scatter_list, src=src, async_op=async_op)


@logged("send", lambda tensor, *_, **__: nbytes(tensor))
def send(tensor: Tensor, dst: int, group: Any = None, tag: int = 0) -> None:
    """Send `tensor` to global rank `dst` and wait until it may be reused."""
    dist.send(tensor, dst, group=group, tag=tag)


@logged("recv", lambda tensor, *_, **__: nbytes(tensor))
def recv(tensor: Tensor, src: int | None = None, group: Any = None, tag: int = 0) -> int:
    """Receive into `tensor` from global rank `src` (None: from any), and return the sender."""
    return dist.recv(tensor, src, group=group, tag=tag)


@logged("isend", lambda tensor, *_, **__: nbytes(tensor))
def isend(tensor: Tensor, dst: int, group: Any = None, tag: int = 0) -> Any:
    """Start sending `tensor` to global rank `dst`."""
    return dist.isend(tensor, dst, group=group, tag=tag)


@logged("irecv", lambda tensor, *_, **__: nbytes(tensor))
def irecv(tensor: Tensor, src: int | None = None, group: Any = None, tag: int = 0) -> Any:
    """Start receiving into `tensor` from global rank `src` (None: from any)."""
    return dist.irecv(tensor, src, group=group, tag=tag)


@logged("barrier", lambda *_, **__: 0)
def barrier(
    group: Any = None, async_op: bool = False, device_ids: list[int] | None = None, label: str = ""
) -> Any:
    """Wait until every rank of `group` is here; `label` says in errors what for."""
    what = words("barrier", label=label)
    links = links_of(group) if dist.get_backend(group) == "gloo" and direct.is_on_host(group) else None
    if links is not None:
        return complete(shared.SumWhole(links, torch.zeros(1), dist.ReduceOp.SUM, what), async_op)
    return by_torch(what, group, dist.barrier, async_op=async_op, device_ids=device_ids)


class TorchBackend:
    """The names of this namespace as one object, for code that hands a backend around."""

    name = "torch"

    def __getattr__(self, name: str) -> Any:
        return getattr(dist, name)
