"""A Llama-shaped transformer: RMS norms, grouped-query attention with rotary positions, SwiGLU.

Shapes: B sequences, T tokens each, D features, H heads, K of them with keys, V tokens to choose.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Shape:
    """Sizes of a model."""

    layers: int
    dim: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int


#: By the number of parameters.
SHAPES = {
    "1b": Shape(layers=16, dim=2048, ffn=8192, heads=32, kv_heads=8, vocab=128256),
    "8b": Shape(layers=32, dim=4096, ffn=14336, heads=32, kv_heads=8, vocab=128256),
    "70b": Shape(layers=80, dim=8192, ffn=28672, heads=64, kv_heads=8, vocab=128256),
}


class Attention(nn.Module):
    """Causal attention; each key serves H / K queries."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.head = head = shape.dim // shape.heads
        self.q = nn.Linear(shape.dim, shape.heads * head, bias=False)
        self.k = nn.Linear(shape.dim, shape.kv_heads * head, bias=False)
        self.v = nn.Linear(shape.dim, shape.kv_heads * head, bias=False)
        self.out = nn.Linear(shape.heads * head, shape.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q = rotate_by_position(self.q(x).unflatten(-1, (-1, self.head)).transpose(1, 2))
        k = rotate_by_position(self.k(x).unflatten(-1, (-1, self.head)).transpose(1, 2))
        v = self.v(x).unflatten(-1, (-1, self.head)).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm attention, then a pre-norm gated MLP."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(shape.dim), nn.RMSNorm(shape.dim)
        self.attention = Attention(shape)
        self.gate = nn.Linear(shape.dim, shape.ffn, bias=False)
        self.up = nn.Linear(shape.dim, shape.ffn, bias=False)
        self.down = nn.Linear(shape.ffn, shape.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        y = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Llama(nn.Module):
    """Tokens [B, T] in, logits [B, T, V] for the token that follows each of them out."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocab, shape.dim)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.dim)
        self.head = nn.Linear(shape.dim, shape.vocab, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def rotate_by_position(x: Tensor, base: float = 500000.0) -> Tensor:
    """Rotary positions (Su et al., arXiv 2104.09864): ``x`` [B, H, T, D/H], pairs (i, i + D/2H)."""
    length, head = x.shape[-2:]
    frequency = base ** (-torch.arange(0, head, 2, device=x.device, dtype=torch.float32) / head)
    angle = torch.arange(length, device=x.device, dtype=torch.float32)[:, None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)  # [T, D/2H]
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
