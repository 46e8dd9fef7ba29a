"""Gradients of one unit on their way from autograd to the optimizer.

p.grad (autograd)  ->  local    whole, accumulated on this rank       only while nothing may be sent
                   ->  parts    in the order of the flat              what is reduced
                   ->  landed   this rank's chunk, summed over ranks  what the optimizer reads
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepspeed import comm
from deepspeed.zero.landed import GradientInMemory, LandedGradient, add_to
from deepspeed.zero.unit import Unit

TINY = 2**6
"""Elements of a part below which, on average, a copy of all costs less than the calls for each."""


class UnitGradients:
    """Collect, reduce and accumulate the gradients of one unit.

    Attributes:
        missing: parameters that have not yet produced a gradient in the running backward.
        used: per parameter, whether it produced any gradient on this rank since the last step.
        landed: this rank's chunk of the summed gradient.
    """

    def __init__(self, unit: Unit, landed: LandedGradient, *, predivide: float) -> None:
        self.unit = unit
        self.missing = len(unit.params)
        self.used = [False] * len(unit.params)
        self.landed = landed
        self._predivide = predivide
        self._local: Tensor | None = None
        self._landing: Tensor | None = None  # in flight
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
            local = self._empty(self.unit.layout.total, self.unit.dtypes.accumulate)
            self._local = comm.laid_out(self._parts(found), local)
        elif found:
            views = self.unit.views(self._local)
            for index, grad in found.items():
                add_to(views[index].view(-1), grad.reshape(-1))

    def start_reduce(self) -> None:
        """Start summing the gradients over ranks; zeros where there are none."""
        alone = self.unit.sharding.everyone.size == 1
        if self._local is not None:
            self.keep_local()
            parts, self._local = [self._local], None
        else:
            parts = self._parts(self._take_from_autograd())
            tiny = self.unit.layout.total < len(parts) * TINY
            if alone or tiny or self._predivide != 1.0:  # which divides what is wide enough for it
                parts = [comm.laid_out(parts, self._empty(self.unit.layout.total, self.unit.dtypes.reduce))]
        if self._predivide != 1.0:
            parts[0].div_(self._predivide)
        if alone:  # nothing is sent, so what was accumulated is not rounded
            self._landing = parts[0]
        else:
            self._send(parts)

    def land(self) -> None:
        """Wait for the running reduction, if any, and add its result to what has landed."""
        landing = self._landing
        if landing is None:
            return
        if self._work is not None:
            self._work.wait()
        self._landing = self._work = None
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
        """Forget all gradients."""
        self._drop_param_grads()
        self.landed.clear()
        self._local = None
        self.used = [False] * len(self.used)

    def _drop_param_grads(self) -> None:
        for param in self.unit.params:
            param.grad = None
        self._exposed = False

    def _take_from_autograd(self) -> dict[int, Tensor]:
        found = {}
        for index, param in enumerate(self.unit.params):
            grad = param.grad
            if grad is not None:
                found[index] = grad.to_dense() if grad.is_sparse else grad
                param.grad = None
                self.used[index] = True
        return found

    def _parts(self, found: dict[int, Tensor]) -> list[Tensor]:
        """Return gradients, flat, in the order of the unit's flat, and zeros where there are none."""
        zero = self.unit.flat.new_zeros(1)
        return [
            found[index].reshape(-1) if index in found else zero.expand(numel)
            for index, numel in self.unit.layout.sequence
        ]

    def _send(self, parts: list[Tensor]) -> None:
        shards, replicas = self.unit.sharding.shard_group, self.unit.sharding.replica_group
        landing = self._empty(self.unit.layout.chunk, self.unit.dtypes.reduce)
        work: torch.distributed.Work | None = None
        if shards.size > 1:
            work = comm.start_reduce_scatter(landing, parts, group=shards.process_group, label=self._label)
            parts = []
        if replicas.size > 1:
            if work is not None:
                work.wait()
            work = comm.start_all_reduce(landing, parts, group=replicas.process_group, label=self._label)
        self._landing, self._work = landing, work

    def _empty(self, numel: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(numel, dtype=dtype, device=self.unit.flat.device)
