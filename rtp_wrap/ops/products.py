"""What an operation gives a rotation: functions of one tile.

A tile is its rectangle of the weight (see ``shard``) and its values, ``[rows, cols, ...]``.

    product(tile, values)          forward: add what this tile gives to the output
    dgrad(tile, values)            backward: add what it gives to the gradient of the input
    reader(published)              forward, where ranks read each other's memory: what product does,
                                   for all tiles of a cell, which are with their owners
    wgrad(tile, start, out, scale) backward: out = start + scale * (this rank's part of the tile's
                                   gradient), where ``start`` may be ``out`` or None for zero
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from rtp_wrap.shard import Tile
from rtp_wrap.transport.cells import Published

Product = Callable[[Tile, torch.Tensor], None]
Reader = Callable[[Published], None]
WeightGradient = Callable[[Tile, torch.Tensor | None, torch.Tensor, float], None]


def add_scaled(
    start: torch.Tensor | None, part: torch.Tensor, scale: float, *, out: torch.Tensor
) -> None:
    """``out = start + scale * part`` in the precision of ``out``; ``start`` may be ``out``."""
    part = part.to(out.dtype)
    if start is None:
        torch.mul(part, scale, out=out)
    else:
        torch.add(start, part, alpha=scale, out=out)
