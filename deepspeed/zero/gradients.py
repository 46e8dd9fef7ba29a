"""Gradients of one unit on their way from autograd to the optimizer.

p.grad (autograd)  ->  local    whole, accumulated on this rank       only while nothing may be sent
                   ->  wire     whole, laid out like the flat         what is reduced
                   ->  landed   this rank's chunk, summed over ranks  what the optimizer reads
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepspeed import comm
from deepspeed.zero.buffers import BufferPool
from deepspeed.zero.landed import GradientInMemory, LandedGradient
from deepspeed.zero.unit import Unit


class UnitGradients:
    """Collect, reduce and accumulate the gradients of one unit.

    Attributes:
        missing: parameters that have not yet produced a gradient in the running backward.
        used: per parameter, whether it produced any gradient on this rank since the last step.
        landed: this rank's chunk of the summed gradient.
    """

    def __init__(self, unit: Unit, pool: BufferPool, landed: LandedGradient, *, predivide: float) -> None:
        self.unit = unit
        self.missing = len(unit.params)
        self.used = [False] * len(unit.params)
        self.landed = landed
        self._pool = pool
        self._predivide = predivide
        self._local: Tensor | None = None
        self._wire: Tensor | None = None  # in flight
        self._landing: Tensor | None = None  # in flight; the wire itself where this rank holds everything
        self._work: torch.distributed.Work | None = None
        self._exposed = False
        self._label = f"gradients of {unit.label}"

    def begin_backward(self) -> None:
        """Expect a gradient of every parameter again."""
        self.missing = len(self.unit.params)
        if self._exposed:
            self._drop_param_grads()

    @property
    def holds_local(self) -> bool:
        """Whether gradients wait on this rank that were never reduced."""
        return self._local is not None

    def keep_local(self) -> None:
        """Add what autograd produced to the local accumulation, and send nothing."""
        found = self._take_from_autograd()
        if self._local is None:
            self._local = self._pool.take(self.unit.layout.total, self.unit.dtypes.accumulate)
            self._lay_out(found, self._local)
        elif found:
            views = self.unit.views(self._local)
            torch._foreach_add_([views[index] for index, _ in found], [grad for _, grad in found])

    def start_reduce(self) -> None:
        """Lay the gradients out on the wire and start summing them over ranks; zeros where there are none."""
        if self._local is None:
            wire = self._pool.take(self.unit.layout.total, self.unit.dtypes.reduce)
            self._lay_out(self._take_from_autograd(), wire)
        else:
            self.keep_local()
            wire, self._local = self._local, None
            if self.unit.sharding.everyone.size > 1:  # alone, nothing is sent, so nothing is rounded
                local = wire
                wire = self._pool.take(local.numel(), self.unit.dtypes.reduce).copy_(local)
                self._pool.give(local)
        if self._predivide != 1.0:
            wire.div_(self._predivide)
        self._send(wire)

    def land(self) -> None:
        """Wait for the running reduction, if any, and add its result to what has landed."""
        wire, landing = self._wire, self._landing
        if wire is None or landing is None:
            return
        if self._work is not None:
            self._work.wait()
        self._wire = self._landing = self._work = None
        if landing is not wire:
            self._pool.give(wire)
        self.landed.add(landing)

    def expose(self) -> None:
        """Show gradients as ``p.grad`` where this rank holds all of them in the parameters' dtype.

        They are views of the shard: an edit between backward and step counts.
        """
        shard = self.landed.shard if isinstance(self.landed, GradientInMemory) else None
        flat = self.unit.flat
        if (
            shard is None
            or self.unit.layout.ranks > 1
            or (shard.dtype, shard.device) != (flat.dtype, flat.device)
        ):
            return
        for param, view, used in zip(self.unit.params, self.unit.views(shard), self.used, strict=True):
            param.grad = view if used else None
        self._exposed = True

    @property
    def nbytes(self) -> int:
        """Bytes of gradients kept on this rank."""
        local = self._local
        return self.landed.nbytes + (0 if local is None else local.numel() * local.element_size())

    def clear(self) -> None:
        """Forget all gradients and give the buffers back."""
        self._drop_param_grads()
        self.landed.clear()
        if self._local is not None:
            self._pool.give(self._local)
        self._local = None
        self.used = [False] * len(self.used)

    def _drop_param_grads(self) -> None:
        for param in self.unit.params:
            param.grad = None
        self._exposed = False

    def _take_from_autograd(self) -> list[tuple[int, Tensor]]:
        found = []
        for index, param in enumerate(self.unit.params):
            grad = param.grad
            if grad is not None:
                found.append((index, grad.to_dense() if grad.is_sparse else grad))
                param.grad = None
                self.used[index] = True
        return found

    def _lay_out(self, found: list[tuple[int, Tensor]], flat: Tensor) -> None:
        """Write gradients to their places in `flat`, and zeros everywhere else."""
        views = self.unit.views(flat)
        if len(found) < len(views):
            flat.zero_()
        else:
            self.unit.zero_gaps(flat)
        if found:
            torch._foreach_copy_([views[index] for index, _ in found], [grad for _, grad in found])

    def _send(self, wire: Tensor) -> None:
        shards, replicas = self.unit.sharding.shard_group, self.unit.sharding.replica_group
        landing, work = wire, None
        if shards.size > 1:
            landing = self._pool.take(self.unit.layout.chunk, self.unit.dtypes.reduce)
            work = comm.reduce_scatter_single(
                landing, wire, group=shards.process_group, async_op=True, label=self._label
            )
        if replicas.size > 1:
            if work is not None:
                work.wait()
            work = comm.start_all_reduce(landing, group=replicas.process_group, label=self._label)
        self._wire, self._landing, self._work = wire, landing, work
