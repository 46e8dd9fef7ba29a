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
from deepspeed.errors import UsageError
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
        self._places = [param.data_ptr() for param in self.params]
        self._versions = [param._version for param in self.params]

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

    def adopt_edits(self) -> None:
        """Take over into the master shard what the user wrote into parameters since the last call.

        Note [Edits of parameters]
            ``param.mul_()``, ``load_state_dict`` and ``nn.init`` raise a parameter's version; updates go
            through the flat and do not. So an edit is seen and reaches the master copy, which would undo it
            at the next step otherwise. It must be the same on every rank. ``param.data`` has no version:
            what is written through it where the master is a copy must be set with safe_set_full_fp32_param.

        Raises:
            UsageError: a parameter's memory was replaced (``.to()``, ``.half()``, ``param.data = ...``).
        """
        versions = [param._version for param in self.params]
        for name, param, place in zip(self.names, self.params, self._places, strict=True):
            if param.data_ptr() != place:
                raise UsageError(
                    f"{name}: expected its memory where deepspeed.initialize laid it out, but it was replaced "
                    "(model.to(), model.half(), param.data = ...); change the model before initialize, and "
                    "values in place: param.copy_(...)"
                )
        if versions == self._versions:
            return
        before, self._versions = self._versions, versions
        for piece in self.my_pieces() if self.master is not self.mine else ():
            if versions[piece.index] != before[piece.index]:
                edited = slice(piece.shard_start, piece.shard_stop)
                self.master[edited] = self.mine[edited]

    def publish(self, *, async_op: bool = False) -> torch.distributed.Work | None:
        """Make the whole parameters current everywhere, once every rank has updated its shard in storage."""
        group = self.sharding.shard_group
        if group.size == 1:
            return None
        work: torch.distributed.Work | None = comm.all_gather_single(
            self.flat, self.mine, group=group.process_group, async_op=async_op
        )
        return work
