"""Attention itself: all heads of this rank's own tokens. Nothing in here knows of other ranks.

Shapes, for ``B`` samples, ``H`` heads of ``D`` features, ``L`` queries and ``S`` keys:

    q     [B, H, L, D]            k, v  [B, H, S, D]
    mask  [B or 1, H or 1, L or 1, S], added to the scores

    weights = dropout(softmax(q @ k^T / sqrt(D) + mask))      [B, H, L, S]
    output  = weights @ v                                     [B, H, L, D]
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    dropout: float,
    is_causal: bool,
    need_weights: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The output and, if they are needed, the weights.

    ``dropout`` is the probability as it applies now; the weights are those after it. ``is_causal``
    stands for a mask, where no weights are needed.
    """
    if not need_weights:
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal), None
    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    if mask is not None:
        scores += mask
    weights = F.dropout(scores.softmax(-1), dropout, training=dropout > 0)
    return weights @ v, weights


def additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask to add to scores of ``dtype``; a bool one is ``True`` where attention is forbidden."""
    if mask.is_floating_point():
        return mask.to(dtype)
    zeros = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return zeros.masked_fill_(mask, float("-inf"))


def append_token(x: torch.Tensor, token: torch.Tensor | None) -> torch.Tensor:
    """``x`` ``[B, H, S, D]`` with ``token``, ``[H, D]`` numbers, or zeros at the end of each."""
    if token is None:
        return F.pad(x, (0, 0, 0, 1))
    samples, heads, _, features = x.shape
    return torch.cat([x, token.view(1, heads, 1, features).expand(samples, -1, -1, -1)], 2)
