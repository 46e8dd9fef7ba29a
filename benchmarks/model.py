"""The GPT every row of a comparison trains, its data, and nothing of any framework."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Shape:
    """Sizes of the model and of one micro-batch."""

    layers: int = 8
    dim: int = 512
    heads: int = 8
    seq: int = 128
    vocab: int = 8192
    batch: int = 4


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.norm1 = nn.LayerNorm(shape.dim)
        self.qkv = nn.Linear(shape.dim, 3 * shape.dim)
        self.out = nn.Linear(shape.dim, shape.dim)
        self.norm2 = nn.LayerNorm(shape.dim)
        self.up = nn.Linear(shape.dim, 4 * shape.dim)
        self.down = nn.Linear(4 * shape.dim, shape.dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, seq, dim) to the same shape."""
        batch, seq, dim = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, seq, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, seq, dim))
        widened: Tensor = F.gelu(self.up(self.norm2(x)), approximate="tanh")
        mlp: Tensor = self.down(widened)
        return x + mlp


class GPT(nn.Module):
    """Decoder with learned positions and an untied head; forward returns the mean cross entropy.

    With `checkpointing`, a block keeps its input alone and runs again in backward.
    """

    def __init__(self, shape: Shape, checkpointing: bool = False) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.tokens = nn.Embedding(shape.vocab, shape.dim)
        self.positions = nn.Embedding(shape.seq, shape.dim)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.dim)
        self.head = nn.Linear(shape.dim, shape.vocab, bias=False)
        self.apply(_initialise)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Loss of predicting `targets` from `ids`, both (batch, seq) int64."""
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def build_model(shape: Shape, checkpointing: bool = False) -> GPT:
    """Build the model from a fixed seed, its weights fp32 but exactly representable in bf16.

    So a framework that keeps its fp32 master as given and one that rounds it first start alike.
    """
    torch.manual_seed(0)
    return GPT(shape, checkpointing).bfloat16().float()


def batches(shape: Shape, rank: int, count: int) -> list[tuple[Tensor, Tensor]]:
    """Draw `count` micro-batches for a rank: arithmetic progressions modulo the vocabulary."""
    generator = torch.Generator().manual_seed(1000 + rank)

    def draw() -> tuple[Tensor, Tensor]:
        start = torch.randint(shape.vocab, (shape.batch, 1), generator=generator)
        stride = torch.randint(1, 4, (shape.batch, 1), generator=generator)
        ids = (start + stride * torch.arange(shape.seq + 1)) % shape.vocab
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    return [draw() for _ in range(count)]


def count_parameters(shape: Shape) -> int:
    """Count the parameters without allocating them."""
    return sum(_sizes(shape))


def largest_parameter(shape: Shape) -> int:
    """Count the elements of the largest parameter."""
    return max(_sizes(shape))


def _sizes(shape: Shape) -> list[int]:
    with torch.device("meta"):
        return [p.numel() for p in GPT(shape).parameters()]
