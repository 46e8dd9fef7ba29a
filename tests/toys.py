"""Tiny models and data shared by tests: different data for every rank, step and micro-batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WIDTH = 6


class Block(nn.Sequential):
    """A sequence with a forward of its own: torch compiles no forward of its own classes by itself."""

    def forward(self, hidden: Tensor) -> Tensor:
        for layer in self:
            hidden = layer(hidden)
        return hidden


class Toy(nn.Module):
    """Embedding, blocks of awkward sizes, a scalar parameter, and a head that may be tied.

    Args:
        tied: the head shares the embedding's weight.
        frozen: the first block does not train.
        unused: has a parameter that no forward touches.
        checkpointing: None, "reentrant" or "non_reentrant".
        depth: number of blocks.
        reaching: its forward uses layers and weights inside blocks by themselves.
    """

    def __init__(
        self,
        *,
        tied=False,
        frozen=False,
        unused=False,
        checkpointing: str | None = None,
        depth: int = 2,
        reaching=False,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, WIDTH)
        self.blocks = nn.ModuleList(
            Block(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 7), nn.GELU(), nn.Linear(7, WIDTH))
            for _ in range(depth)
        )
        self.gain = nn.Parameter(torch.tensor(1.3))
        self.empty = nn.Parameter(torch.empty(0))
        self.head = nn.Linear(WIDTH, 11, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        if frozen:
            self.blocks[0].requires_grad_(False)
        if unused:
            self.unused = nn.Parameter(torch.full((5,), 0.7))
        self.checkpointing = checkpointing
        self.reaching = reaching

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        if self.reaching:
            first, last = self.blocks[0], self.blocks[-1]
            hidden = first[3](first[1](hidden)) + hidden @ last[3].weight @ last[1].weight
        for block in self.blocks:
            if self.checkpointing and self.training:
                hidden = hidden + checkpoint(block, hidden, use_reentrant=self.checkpointing == "reentrant")
            else:
                hidden = hidden + block(hidden)
        return self.head(hidden * self.gain + self.empty.sum())


def make_toy(seed: int = 0, **options) -> Toy:
    """Return a `Toy` whose weights depend on the seed only."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Toy(**options)


def toy_batch(step: int, micro: int, rank: int) -> tuple[Tensor, Tensor]:
    """Return (tokens, targets), both [3, 4], different for every argument."""
    generator = torch.Generator().manual_seed(1 + step * 10_000 + micro * 100 + rank)
    tokens = torch.randint(0, 11, (3, 5), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def toy_loss(model, batch) -> Tensor:
    """Mean cross-entropy, computed in fp32."""
    tokens, targets = batch
    logits = model(tokens).float()
    return nn.functional.cross_entropy(logits.reshape(-1, 11), targets.reshape(-1))
