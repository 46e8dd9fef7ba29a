"""Unit: parameters that travel together, back to back in one flat buffer.

flat     [ p0 ........ | p1 .. | p2 ................ | gap ]    dtype of storage; parameters are views of it
mine     [   ......    ]                                       my shard of the flat, a view
master   [   ......    ]                                       my shard in the master dtype; `mine` itself
                                                               where the dtypes are equal
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from deepspeed import comm
from deepspeed.precision.policy import ParamDtypes
from deepspeed.zero.layout import Layout, Piece
from deepspeed.zero.stage import Sharding


class Unit:
    """Parameters of one dtype in one flat, this rank's shard of it and the shard's master copy.

    Building a unit moves the parameters into the flat: their values come from the first data-parallel
    rank, and their ``.data`` become views. The master copy is cut from the values as they were given,
    before they are rounded to the storage dtype.

    Args:
        named: the (name, parameter) pairs, in the order of the layout.
        layout: where they lie; its `ranks` is the size of the shard group.
        sharding: the groups of ranks.
        dtypes: number formats.
        device: where the flat lives.
    """

    def __init__(
        self,
        named: Sequence[tuple[str, nn.Parameter]],
        layout: Layout,
        sharding: Sharding,
        dtypes: ParamDtypes,
        device: torch.device,
    ) -> None:
        self.names = [name for name, _ in named]
        self.params = [param for _, param in named]
        self.layout = layout
        self.sharding = sharding
        self.dtypes = dtypes
        given = self._gather_given(device)
        self.flat = given.to(dtypes.storage)
        chunk, rank = layout.chunk, sharding.shard_group.rank
        self.mine = self.flat[rank * chunk : (rank + 1) * chunk]
        self.master = self.mine
        if dtypes.master != dtypes.storage:
            self.master = given[rank * chunk : (rank + 1) * chunk].to(dtypes.master, copy=True)
        for param, view in zip(self.params, self.views(self.flat), strict=True):
            param.grad = None
            param.data = view

    def _gather_given(self, device: torch.device) -> Tensor:
        """Return the parameters' values in one new flat, equal on all data-parallel ranks."""
        dtype = self.params[0].dtype
        for param in self.params[1:]:
            dtype = torch.promote_types(dtype, param.dtype)
        given = torch.zeros(self.layout.total, dtype=dtype, device=device)
        with torch.no_grad():
            for param, view in zip(self.params, self.views(given), strict=True):
                view.copy_(param)
        for group in (self.sharding.shard_group, self.sharding.replica_group):
            if group.size > 1:
                comm.broadcast(given, src=group.first_rank, group=group.process_group)
        return given

    def views(self, flat: Tensor) -> list[Tensor]:
        """View a whole flat (or a gradient laid out like it) as the parameters, in their shapes."""
        return [
            flat[offset : offset + numel].view(param.shape)
            for offset, numel, param in zip(self.layout.offsets, self.layout.numels, self.params, strict=True)
        ]

    def zero_gaps(self, flat: Tensor) -> None:
        """Clear what belongs to no parameter, so that norms over a whole shard are right."""
        for start, stop in self.layout.gaps:
            flat[start:stop].zero_()

    def my_pieces(self) -> list[Piece]:
        """Pieces of the parameters in this rank's shard."""
        return self.layout.pieces(self.sharding.shard_group.rank)

    def publish(self, *, async_op: bool = False) -> torch.distributed.Work | None:
        """Make the whole parameters current everywhere, once every rank has updated its shard in storage."""
        group = self.sharding.shard_group
        if group.size == 1:
            return None
        work: torch.distributed.Work | None = comm.all_gather_single(
            self.flat, self.mine, group=group.process_group, async_op=async_op
        )
        return work
