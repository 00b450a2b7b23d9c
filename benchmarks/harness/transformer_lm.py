"""The original benchmark's language model, dense: post-norm blocks with ReLU, untied head.

Shapes: B sequences, T tokens each, D features (``ninp``), V tokens to choose from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Shape:
    """Sizes, by the names of the original's flags."""

    ninp: int
    nhid: int
    nhead: int
    layers: int
    vocab: int
    dropout: float = 0.0
    initrange: float = 0.1


#: What the original calls a ``--model_config``.
SHAPES = {
    "gpt2-medium": Shape(ninp=1024, nhid=4096, nhead=16, layers=24, vocab=50256),  # 340M
    "gpt2-large": Shape(ninp=1280, nhid=5120, nhead=20, layers=36, vocab=50256),  # 774M
    "neo-1.3b": Shape(ninp=2048, nhid=8192, nhead=16, layers=24, vocab=50256),
    "gpt2-xl": Shape(ninp=1600, nhid=6400, nhead=25, layers=48, vocab=50256),  # 1.5B
    "neo-2.7b": Shape(ninp=2560, nhid=10240, nhead=20, layers=32, vocab=50256),
    "7b": Shape(ninp=4096, nhid=16384, nhead=32, layers=32, vocab=50256),
}


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.head = shape.ninp // shape.nhead
        self.dropout = shape.dropout
        self.q = nn.Linear(shape.ninp, shape.ninp)
        self.k = nn.Linear(shape.ninp, shape.ninp)
        self.v = nn.Linear(shape.ninp, shape.ninp)
        self.out = nn.Linear(shape.ninp, shape.ninp)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head)).transpose(1, 2)  # [B, heads, T, D/heads]
            for project in (self.q, self.k, self.v)
        )
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention, then two linears; each is added to its input and normalised."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention = Attention(shape)
        self.mlp = nn.Sequential(
            nn.Linear(shape.ninp, shape.nhid),
            nn.ReLU(),
            nn.Dropout(shape.dropout),
            nn.Linear(shape.nhid, shape.ninp),
        )
        self.attention_norm, self.mlp_norm = nn.LayerNorm(shape.ninp), nn.LayerNorm(shape.ninp)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention_norm(x + self.dropout(self.attention(x)))
        return self.mlp_norm(x + self.dropout(self.mlp(x)))


class TransformerLM(nn.Module):
    """Tokens [B, T] in, logits [B, T, V] for the token that follows each of them out."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.scale = math.sqrt(shape.ninp)
        self.embedding = nn.Embedding(shape.vocab, shape.ninp)
        self.dropout = nn.Dropout(shape.dropout)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.head = nn.Linear(shape.ninp, shape.vocab)
        for module in (self.embedding, self.head):
            vars(module)["initrange"] = shape.initrange  # for whoever initialises it

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) * self.scale
        x = self.dropout(x + positions(tokens.shape[1], x.shape[-1], x))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def positions(length: int, dim: int, like: Tensor) -> Tensor:
    """Sinusoids (Vaswani et al., arXiv 1706.03762, 3.5): [length, dim], sines at even features."""
    place = torch.arange(length, device=like.device, dtype=torch.float32)[:, None]
    feature = torch.arange(0, dim, 2, device=like.device, dtype=torch.float32)
    angle = place * torch.exp(feature * (-math.log(10000.0) / dim))  # [T, D/2]
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1).to(like.dtype)
