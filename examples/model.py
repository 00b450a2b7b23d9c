"""A small causal transformer over bytes: plain PyTorch, nothing in it knows about ranks.

Shapes: B sequences, T bytes each, D features, H heads, V = 256 byte values.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY = 256


def linear(inputs: int, outputs: int, std: float = 0.02) -> nn.Linear:
    """Return a projection with normal weights and no offset."""
    layer = nn.Linear(inputs, outputs)
    nn.init.normal_(layer.weight, std=std)
    nn.init.zeros_(layer.bias)
    return layer


class Attention(nn.Module):
    """Causal self-attention with one projection in and one out."""

    def __init__(self, width: int, heads: int, closing_std: float) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} must be a multiple of heads {heads}")
        self.heads = heads
        self.qkv = linear(width, 3 * width)
        self.out = linear(width, width, closing_std)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, T, D / H]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    """Pre-norm attention, then a pre-norm MLP four times as wide."""

    def __init__(self, width: int, heads: int, closing_std: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads, closing_std)
        self.mlp_norm = nn.LayerNorm(width)
        self.up = linear(width, 4 * width)
        self.down = linear(4 * width, width, closing_std)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class ByteTransformer(nn.Module):
    """Bytes [B, T] in, logits [B, T, V] for the byte that follows each of them out."""

    def __init__(self, layers: int, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.context = context
        self.bytes = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(context, width)
        for table in (self.bytes, self.positions):
            nn.init.normal_(table.weight, std=0.02)
        closing_std = 0.02 / (2 * layers) ** 0.5  # of the 2 * layers terms that x is the sum of
        self.blocks = nn.ModuleList(Block(width, heads, closing_std) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = linear(width, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        x = self.bytes(tokens) + self.positions(torch.arange(length, device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))
