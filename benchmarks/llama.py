"""Decoders with the shapes of Llama 2: what large models are made of, for simulations.

Rotary positions are left out: they have no parameters and change no shape.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class LlamaShape:
    """Sizes of a model; `kv_heads` heads of keys and values are shared by `heads` of queries."""

    layers: int
    dim: int
    heads: int
    kv_heads: int
    hidden: int
    vocab: int = 32000


SHAPES = {
    "7B": LlamaShape(layers=32, dim=4096, heads=32, kv_heads=32, hidden=11008),
    "70B": LlamaShape(layers=80, dim=8192, heads=64, kv_heads=8, hidden=28672),
}


class Block(nn.Module):
    """Pre-norm attention and gated MLP."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.head = shape.dim // shape.heads
        narrow = self.head * shape.kv_heads
        self.attention_norm = nn.RMSNorm(shape.dim)
        self.q = nn.Linear(shape.dim, shape.dim, bias=False)
        self.k = nn.Linear(shape.dim, narrow, bias=False)
        self.v = nn.Linear(shape.dim, narrow, bias=False)
        self.o = nn.Linear(shape.dim, shape.dim, bias=False)
        self.mlp_norm = nn.RMSNorm(shape.dim)
        self.gate = nn.Linear(shape.dim, shape.hidden, bias=False)
        self.up = nn.Linear(shape.dim, shape.hidden, bias=False)
        self.down = nn.Linear(shape.hidden, shape.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, seq, dim) to the same shape."""
        batch, seq, dim = x.shape
        normed = self.attention_norm(x)
        q, k, v = (
            part(normed).view(batch, seq, -1, self.head).transpose(1, 2) for part in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(mixed.transpose(1, 2).reshape(batch, seq, dim))
        normed = self.mlp_norm(x)
        mlp: Tensor = self.down(F.silu(self.gate(normed)) * self.up(normed))
        return x + mlp


class Llama(nn.Module):
    """Decoder with an untied head; forward returns the mean cross entropy."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.tokens = nn.Embedding(shape.vocab, shape.dim)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.dim)
        self.head = nn.Linear(shape.dim, shape.vocab, bias=False)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Loss of predicting `targets` from `ids`, both (batch, seq) int64."""
        x = self.tokens(ids)
        for layer in self.layers:
            x = layer(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def count_parameters(shape: LlamaShape) -> int:
    """Count the parameters without allocating them."""
    with torch.device("meta"):
        return sum(param.numel() for param in Llama(shape).parameters())
