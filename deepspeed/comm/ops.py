"""The rest of ``torch.distributed`` under ``deepspeed.comm`` with the same arguments, counted likewise."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from deepspeed.accelerator import get_accelerator
from deepspeed.comm import direct, exchanges
from deepspeed.comm.calls import words
from deepspeed.comm.collectives import by_torch, complete
from deepspeed.comm.log import logged, nbytes, total_nbytes


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
    tensor = exchanges.stored(tensor)
    work = exchanges.broadcast(group, tensor, src, async_op, what)
    if work is None:
        return by_torch(what, group, dist.broadcast, tensor, src, async_op=async_op)
    return complete(work, async_op)


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
    work = exchanges.all_to_all_single(group, output, input, *sizes, what)
    if work is None:
        return by_torch(what, group, dist.all_to_all_single, output, input, *sizes, async_op=async_op)
    return complete(work, async_op)


@logged("all_to_all", lambda outputs, inputs, *_, **__: total_nbytes(inputs))
def all_to_all(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], group: Any = None, async_op: bool = False
) -> Any:
    """Send one tensor of `inputs` to each rank and collect theirs in `outputs`."""
    what = words("all_to_all")
    work = exchanges.all_to_all(group, outputs, inputs, what)
    if work is None:
        return by_torch(what, group, dist.all_to_all, list(outputs), list(inputs), async_op=async_op)
    return complete(work, async_op)


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
    on_host = dist.get_backend(group) == "gloo" or direct.is_shared(group)  # else a device's ranks wait on it
    work = exchanges.barrier(group, what) if on_host else None
    if work is None:
        return by_torch(what, group, dist.barrier, async_op=async_op, device_ids=device_ids)
    return complete(work, async_op)


class TorchBackend:
    """The names of this namespace as one object, for code that hands a backend around."""

    name = "torch"

    def __getattr__(self, name: str) -> Any:
        return getattr(dist, name)
