"""Sums over ranks, in rank order: 16-bit floats are accumulated in fp32 and rounded once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

BLOCK = 2**16  # elements summed at a time: their parts and the fp32 sum stay in the cache
UNREDUCED = {torch.bool, torch.uint16, torch.uint32, torch.uint64}
REDUCIBLE = (dist.ReduceOp.SUM, dist.ReduceOp.AVG, dist.ReduceOp.MIN, dist.ReduceOp.MAX)


def is_reducible(dtype: torch.dtype, op: Any) -> bool:
    """Tell whether `Summing` knows an operation on tensors of `dtype`."""
    return op in REDUCIBLE and dtype not in UNREDUCED and not dtype.is_complex


def _is_narrow(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize == 1


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that tensors of `dtype` are summed in."""
    return torch.float32 if dtype.is_floating_point and dtype.itemsize < 4 else dtype


class Summing:
    """Reduce parts block by block into an output.

    Args:
        output: flat; may be the part of one rank itself.
        mine: this rank's part, for its dtype.
        op: one of `REDUCIBLE`.
        block: most elements of a block.
    """

    def __init__(self, output: Tensor, mine: Tensor, op: Any, block: int) -> None:
        self._output, self._op = output, op
        wide = sum_dtype(mine.dtype)
        in_place = output.dtype == wide and output.data_ptr() != mine.data_ptr()
        self._scratch = None if in_place else mine.new_empty(block, dtype=wide)

    @torch.no_grad()
    def reduce(self, block: slice, parts: Sequence[Tensor]) -> None:
        """Write the reduction of every rank's `parts` (the block only, by rank) to the output's block."""
        output = self._output[block]
        total = output if self._scratch is None else self._scratch[: output.numel()]
        for rank, part in enumerate(parts):
            if _is_narrow(part.dtype):  # torch adds nothing to 8-bit floats
                part = part.to(total.dtype)
            if rank == 0:
                total.copy_(part)
            elif self._op == dist.ReduceOp.MAX:
                torch.maximum(total, part, out=total)
            elif self._op == dist.ReduceOp.MIN:
                torch.minimum(total, part, out=total)
            else:
                total.add_(part)
        if self._op == dist.ReduceOp.AVG:
            total.div_(len(parts), rounding_mode=None if total.is_floating_point() else "trunc")
        if total is not output:
            output.copy_(total)


def reduce_parts(output: Tensor, parts: Sequence[Tensor], op: Any) -> None:
    """Write the reduction of every rank's part (flat, by rank) to `output`, which may be one of them.

    The sum of two is one operation, which rounds once, too.
    """
    alike = {part.dtype for part in parts} == {output.dtype} and not _is_narrow(output.dtype)
    if len(parts) == 2 and op == dist.ReduceOp.SUM and alike:
        torch.add(*parts, out=output)
        return
    inside = (part for part in parts if part.data_ptr() == output.data_ptr())
    summing = Summing(output, next(inside, parts[0]), op, min(BLOCK, output.numel()))
    for start in range(0, output.numel(), BLOCK):
        block = slice(start, min(start + BLOCK, output.numel()))
        summing.reduce(block, [part[block] for part in parts])
