"""Text from a trained model, one byte after another."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


@torch.no_grad()
def generate(
    model: Callable[[Tensor], Tensor],
    prompt: str,
    *,
    count: int,
    seq: int,
    temperature: float,
    seed: int,
    device: torch.device,
) -> str:
    """Continue `prompt` by `count` bytes. The same seed gives the same text on every rank.

    `model` maps tokens (1, length) to logits (1, length, 256) and sees at most the last `seq` bytes.
    """
    generator = torch.Generator().manual_seed(seed)
    text = torch.tensor([list(prompt.encode() or b"\n")])
    for _ in range(count):
        logits = model(text[:, -seq:].to(device))[0, -1].float().cpu()
        chances = torch.softmax(logits / temperature, dim=-1)
        following = torch.multinomial(chances, 1, generator=generator)
        text = torch.cat((text, following[None]), dim=1)
    return _readable(bytes(text[0].tolist()))


def _readable(text: bytes) -> str:
    """Decode, with a mark for whatever a terminal would not show."""
    return "".join(
        each if each.isprintable() or each in "\n\t" else "\N{REPLACEMENT CHARACTER}"
        for each in text.decode(errors="replace")
    )
