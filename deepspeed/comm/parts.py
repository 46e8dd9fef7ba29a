"""One flat message whose parts lie apart.

Note [Parts]
    Gradients come from autograd one tensor for each parameter. What reads them where they are needs no flat copy
    of them: between ranks of one host each part is written straight to the room that the others read, and this
    rank's own are summed from where they lie. Only what goes to a device's or the network's collectives is laid
    out first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def numel_of(parts: Sequence[Tensor]) -> int:
    """Count the elements of a message."""
    return sum(part.numel() for part in parts)


@torch.no_grad()
def laid_out(parts: Sequence[Tensor], out: Tensor) -> Tensor:
    """Fill `out` (flat) with the parts (flat, of any dtype), one after the other, and return it."""
    places = out.split([part.numel() for part in parts])
    if parts:
        torch._foreach_copy_(list(places), list(parts))
    return out


def cut(parts: Sequence[Tensor], lengths: Sequence[int]) -> list[list[Tensor]]:
    """Cut a message into pieces of these lengths (elements, in all as long as it), each again in parts."""
    pieces: list[list[Tensor]] = []
    waiting = list(reversed(parts))
    for length in lengths:
        piece: list[Tensor] = []
        while length > 0:
            part = waiting.pop()
            if part.numel() > length:
                waiting.append(part[length:])
                part = part[:length]
            piece.append(part)
            length -= part.numel()
        pieces.append(piece)
    return pieces
