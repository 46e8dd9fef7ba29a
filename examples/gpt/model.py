"""A GPT over bytes: plain PyTorch, nothing in here knows DeepSpeed.

bytes (batch, seq) -> embedding -> layers x [attention, mlp] -> norm -> logits (batch, seq, 256)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 256  # every byte is a token: nothing to train or download


@dataclass(frozen=True)
class Shape:
    """The sizes that define a model; saved beside its weights."""

    layers: int
    dim: int
    heads: int
    seq: int


class Rotary(nn.Module):
    """Turn queries and keys by their position, so that attention sees distances."""

    cos: Tensor  # (seq, head_dim / 2), like sin
    sin: Tensor

    def __init__(self, head_dim: int, seq: int) -> None:
        super().__init__()
        speeds = 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        angles = torch.outer(torch.arange(seq, dtype=torch.float32), speeds)  # (seq, head_dim / 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Turn `x` (batch, heads, seq, head_dim); the result has the same shape and dtype."""
        length = x.shape[-2]
        cos, sin = self.cos[:length].to(x.dtype), self.sin[:length].to(x.dtype)
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


class Attention(nn.Module):
    """Causal self-attention in one projection in and one out."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, rotary: Rotary) -> Tensor:
        """Map `x` (batch, seq, dim) to the same shape."""
        batch, length, dim = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, dim // self.heads)
        query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))  # (batch, heads, seq, head_dim)
        mixed = F.scaled_dot_product_attention(rotary(query), rotary(key), value, is_causal=True)
        joined: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, dim))
        return joined


class Block(nn.Module):
    """One transformer layer: attention, then a two-layer MLP, each added to what came in."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.mlp_norm = nn.LayerNorm(dim)
        self.widen = nn.Linear(dim, 4 * dim, bias=False)
        self.narrow = nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x: Tensor, rotary: Rotary) -> Tensor:
        """Map `x` (batch, seq, dim) to the same shape."""
        x = x + self.attention(self.attention_norm(x), rotary)
        wide = F.gelu(self.widen(self.mlp_norm(x)), approximate="tanh")  # (batch, seq, 4 * dim)
        return torch.add(x, self.narrow(wide))


class GPT(nn.Module):
    """Predict each next byte. Called with targets it returns the mean loss, without them the logits."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(VOCABULARY, shape.dim)
        self.rotary = Rotary(shape.dim // shape.heads, shape.seq)
        self.blocks = nn.ModuleList(Block(shape.dim, shape.heads) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.dim)
        self.head = nn.Linear(shape.dim, VOCABULARY, bias=False)
        self.apply(self._initialise)

    def _initialise(self, module: nn.Module) -> None:
        """Draw weights with deviation 0.02; what adds to the residual stream starts smaller, as in GPT-2."""
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, Block):
            for linear in (module.attention.out, module.narrow):
                nn.init.normal_(linear.weight, std=0.02 / math.sqrt(2 * self.shape.layers))

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return logits (batch, seq, 256), or with `targets` the mean loss in nats per byte (fp32 scalar)."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.rotary)
        logits: Tensor = self.head(self.norm(x))
        if targets is None:
            return logits
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
