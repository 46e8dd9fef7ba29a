"""A process group under torch.distributed that moves data through memory which the ranks of a host share.

Note [A backend of torch's]
    `register` makes it known as ``shm``, for tensors on the CPU. A group of that kind has the links
    that ``deepspeed.comm`` would give it (note [Rooms and signals]), so calls made by either's functions are
    numbered together, and are the same exchanges. Torch takes it by name only:

        torch.distributed.init_process_group("shm")        every group; "cpu:shm" is the same
        torch.distributed.new_group(ranks, backend="shm")  this one
        deepspeed.init_distributed(dist_backend="shm")     registers it, too

    What `deepspeed.comm.exchanges` has no exchange for goes to a gloo backend that the group holds: peers are told,
    so that calls which do not match are still found. Sends and receives go there as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepspeed.comm import exchanges
from deepspeed.comm.calls import words
from deepspeed.comm.direct import DeferredWork
from deepspeed.comm.neighbours import links_of

NAME = "shm"
c10d: Any = dist.distributed_c10d  # where the options are
ProcessGroup: Any = dist.ProcessGroup  # declared with arguments of several shapes


class SharedMemoryGroup(ProcessGroup):
    """The ranks of a group, under the names by which torch calls a process group.

    Each method takes what torch gives it, tensors in lists among others, and returns a Work.

    Args:
        store: where the ranks meet, this group's own.
        rank: of this process in the group.
        size: of the group.
        timeout: of a collective.
    """

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        self._gloo: Any = dist.ProcessGroupGloo(store, rank, size, timeout)
        kind = ProcessGroup.BackendType.GLOO
        self._register_backend(torch.device("cpu"), kind, self._gloo)  # takes what has no method here
        self._set_default_backend(kind)

    def getBackendName(self) -> str:
        """Return the name it is registered by."""
        return NAME

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> Any:
        """Reduce a tensor in place."""
        opts, (tensor,) = opts or c10d.AllreduceOptions(), tensors
        what = words("all_reduce", tensor.numel(), tensor.dtype)
        work = exchanges.all_reduce(self, tensor, opts.reduceOp.op, what, ordered=_is_waited_for(opts))
        return self._started(work, tensors, what, self._gloo.allreduce, tensors, opts)

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any = None) -> Any:
        """Reduce several tensors in place."""
        return self._together([self.allreduce([one], opts) for one in tensors], tensors)

    def broadcast(self, tensors: list[Tensor], opts: Any = None) -> Any:
        """Copy a tensor from one rank to all."""
        opts, tensor = opts or c10d.BroadcastOptions(), exchanges.stored(*tensors)
        source = dist.get_global_rank(self, opts.rootRank)
        what = words(f"broadcast from rank {source}", tensor.numel(), tensor.dtype)
        work = exchanges.broadcast(self, tensor, source, not _is_waited_for(opts), what)
        return self._started(work, tensors, what, self._gloo.broadcast, [tensor], opts)

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> Any:
        """Collect the tensors of all ranks, one by one."""
        opts, (output,), (input,) = opts or c10d.AllgatherOptions(), outputs, inputs
        what = words("all_gather", input.numel(), input.dtype)
        work = exchanges.all_gather(self, output, input, what, ordered=_is_waited_for(opts))
        return self._started(work, output, what, self._gloo.allgather, outputs, inputs, opts)

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = None) -> Any:
        """Collect the tensors of all ranks in one."""
        opts, what = opts or c10d.AllgatherOptions(), words("all_gather_single", input.numel(), input.dtype)
        work = exchanges.all_gather_single(self, output, input, what, ordered=_is_waited_for(opts))
        return self._started(work, [output], what, self._gloo._allgather_base, output, input, opts)

    def all_gather_single_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None
    ) -> Any:
        """Collect several tensors of all ranks, each in one."""
        pairs = zip(outputs, inputs, strict=True)
        return self._together([self.all_gather_single(*pair, opts) for pair in pairs], outputs)

    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None) -> Any:
        """Reduce one tensor for each rank."""
        opts, (output,), (input,) = opts or c10d.ReduceScatterOptions(), outputs, inputs
        what = words("reduce_scatter", output.numel(), output.dtype)
        op, ordered = opts.reduceOp.op, _is_waited_for(opts)
        work = exchanges.reduce_scatter(self, output, input, op, what, ordered=ordered)
        return self._started(work, outputs, what, self._gloo.reduce_scatter, outputs, inputs, opts)

    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Any = None) -> Any:
        """Reduce a tensor that holds a chunk for each rank."""
        opts = opts or c10d.ReduceScatterOptions()
        what = words("reduce_scatter_single", input.numel(), input.dtype)
        op, ordered = opts.reduceOp.op, _is_waited_for(opts)
        work = exchanges.reduce_scatter_single(self, output, input, op, what, ordered=ordered)
        return self._started(work, [output], what, self._gloo._reduce_scatter_base, output, input, opts)

    def reduce_scatter_single_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None
    ) -> Any:
        """Reduce several tensors that hold a chunk for each rank."""
        pairs = zip(outputs, inputs, strict=True)
        return self._together([self.reduce_scatter_single(*pair, opts) for pair in pairs], outputs)

    def all_to_all_single(
        self,
        output: Tensor,
        input: Tensor,
        output_rows: list[int],
        input_rows: list[int],
        opts: Any = None,
    ) -> Any:
        """Give each rank its rows of a tensor and collect theirs."""
        opts, what, sizes = (
            opts or c10d.AllToAllOptions(),
            words("all_to_all_single"),
            (output_rows, input_rows),
        )
        work = exchanges.all_to_all_single(self, output, input, *sizes, what)
        return self._started(work, [output], what, self._gloo.alltoall_base, output, input, *sizes, opts)

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Any:
        """Give each rank its tensor and collect theirs."""
        opts, what = opts or c10d.AllToAllOptions(), words("all_to_all")
        work = exchanges.all_to_all(self, outputs, inputs, what)
        return self._started(work, outputs, what, self._gloo.alltoall, outputs, inputs, opts)

    def barrier(self, opts: Any = None) -> Any:
        """Wait for all ranks."""
        opts, what = opts or c10d.BarrierOptions(), words("barrier")
        return self._started(exchanges.barrier(self, what), [], what, self._gloo.barrier, opts)

    def reduce(self, tensors: list[Tensor], opts: Any) -> Any:
        """Reduce a tensor to one rank, by gloo."""
        target, (tensor,) = dist.get_global_rank(self, opts.rootRank), tensors
        what = words(f"reduce to rank {target}", tensor.numel(), tensor.dtype)
        return self._started(None, tensors, what, self._gloo.reduce, tensors, opts)

    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any) -> Any:
        """Collect the tensors of all ranks on one, by gloo."""
        what = words(f"gather to rank {dist.get_global_rank(self, opts.rootRank)}")
        return self._started(None, outputs, what, self._gloo.gather, outputs, inputs, opts)

    def scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any) -> Any:
        """Give each rank its tensor of one rank's, by gloo."""
        what = words(f"scatter from rank {dist.get_global_rank(self, opts.rootRank)}")
        return self._started(None, outputs, what, self._gloo.scatter, outputs, inputs, opts)

    # Names before torch 2.13.
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single

    def _started(
        self, work: Any, outputs: Sequence[Any], what: bytes, by_gloo: Callable[..., Any], *args: Any
    ) -> Any:
        """Return an exchange as torch wants it; where there is none, start gloo's."""
        if work is not None:
            return ExchangeWork(work, outputs)
        begun = exchanges.elsewhere(what, self, links_of(self), partial(by_gloo, *args))
        return GlooWork(begun, what, self, outputs)

    def _together(self, works: Sequence[Any], outputs: Sequence[Tensor]) -> Any:
        return ExchangeWork(DeferredWork(works, b"collectives in one", self), outputs)


class ExchangeWork(dist.Work):
    """A Work of `deepspeed.comm.exchanges` with the rest of what torch asks of its own.

    Args:
        work: has `wait` and `is_completed`.
        outputs: tensors that it fills.
    """

    def __init__(self, work: Any, outputs: Sequence[Tensor]) -> None:
        super().__init__()
        self._work, self._outputs = work, list(outputs)

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Block until the data is in place (CommunicationError: a peer is gone, or late by the timeout)."""
        return bool(self._work.wait(timeout))

    def is_completed(self) -> bool:
        """Tell whether the data is in place; what has arrived is put there.

        Among hosts that is not known before `wait`: gloo does not say it of sends and receives.
        """
        return bool(self._work.is_completed())

    def result(self) -> list[Tensor]:
        """Return the tensors that are filled."""
        return self._outputs

    def get_future(self) -> Any:
        """Wait, and return a future that holds the tensors: nobody else would complete it."""
        self.wait()
        future: Any = torch.futures.Future()
        future.set_result(self._outputs)
        return future


class GlooWork(ExchangeWork):
    """A call that gloo makes; unlike an exchange it goes on while nobody waits, and so does what its future calls.

    Args:
        begun: gloo's own Work.
        what: words of the call.
        group: of ranks.
        outputs: tensors that it fills.
    """

    def __init__(self, begun: Any, what: bytes, group: Any, outputs: Sequence[Any]) -> None:
        super().__init__(DeferredWork([begun], what, group), outputs)
        self._begun = begun

    def result(self) -> list[Tensor]:
        """Return the tensors that are filled, as gloo does."""
        found: list[Tensor] = self._begun.result()
        return found

    def get_future(self) -> Any:
        """Return gloo's future."""
        return self._begun.get_future()


def _is_waited_for(opts: Any) -> bool:
    """Tell whether torch's function waits itself; older versions do not say."""
    return not getattr(opts, "asyncOp", True)


def register() -> None:
    """Make the backend known to torch, where it has gloo; once more is harmless.

    Not done on import: torch gives a group of "cpu:gloo" no default backend once any other is registered.
    """
    if dist.is_available() and dist.is_gloo_available():
        dist.Backend.register_backend(NAME, SharedMemoryGroup, devices=["cpu"])
