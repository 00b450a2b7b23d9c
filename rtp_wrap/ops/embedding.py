r"""Embedding lookup in a rotating table.

Shapes, for ``T`` ids of this rank, ``V`` rows of ``D`` columns, ``N`` ranks:

    ids [T]        this rank's own, in [0, V)         dy [T, D]
    W   [V, D]     table; this rank holds W_r, its rows (dim 0) or columns (dim 1)
    y   [T, D]

The table is a set of tiles ``W[R, C]`` (rows ``R``, columns ``C``; see ``shard``), each of which
passes every rank once in forward; or ranks read single rows of it (see ``lookup``). In backward
only accumulators travel: no gradient needs values.

    forward    y[t, C] = W[ids[t], C]                  where ids[t] is in R
    dgrad      none: ids have no gradient
    wgrad      dW[v, C] = 1/N * sum over ranks of the sum of dy[t, C] over ids[t] = v, for v in R;
                          with scale_grad_by_freq divided by how often v is in this rank's ids;
                          zero for v = padding_idx

An element of ``y`` is written once, by the one tile that holds it, so the result is the unsharded
one bit for bit. Every tile looks at all T ids, and those outside of it read some row that is not
used: shapes depend on no values, and a GPU's host waits for nothing.

dtypes: tiles and ``y`` are in the ring's compute dtype of the weight; autocast leaves it alone, as
it does ``F.embedding``. So is a rank's part of a gradient (see ``row_sums``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor

from rtp_wrap.double_backward import refuse_double_backward
from rtp_wrap.engine import Function
from rtp_wrap.gradient import Gradient, deliver
from rtp_wrap.ops.lookup import Lookup
from rtp_wrap.ops.rotate import rotate_backward, rotate_forward, without_autocast
from rtp_wrap.ops.row_sums import RowSums
from rtp_wrap.ring import Ring
from rtp_wrap.written import WriteCheck


def rotated_embedding(
    ids: torch.Tensor,
    weight: DTensor,
    ring: Ring,
    fqn: str,
    *,
    padding_idx: int | None = None,
    scale_grad_by_freq: bool = False,
) -> torch.Tensor:
    """``weight[ids]`` for a weight whose shards stay at home and rotate as tiles.

    ``ids`` is int32 or int64 of any shape, this rank's own; ``weight`` a DTensor ``[V, D]``,
    ``Shard(0)`` or ``Shard(1)`` over the ring; ``fqn`` names the layer in errors. Row
    ``padding_idx``, counted from 0, gets no gradient. Returns ``[*ids.shape, D]``. All ranks of the
    ring must call it together. The gradient of ``weight`` is averaged over ranks and sharded like
    it.

    Raises ``TypeError``, ``ValueError`` or ``IndexError`` for ids of another dtype, on another
    device or out of range, before any communication; on CUDA the range is asserted by the device.
    """
    _check(ids, weight, fqn)
    y: torch.Tensor = _RotatedEmbedding.apply(
        weight, ids, ring, fqn, padding_idx, scale_grad_by_freq
    )
    return y


def _check(ids: torch.Tensor, weight: DTensor, fqn: str) -> None:
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{fqn}: ids are {ids.dtype}; convert them to torch.int64 or torch.int32")
    if ids.device != weight.device:
        raise ValueError(
            f"{fqn}: ids are on {ids.device} but the weight is on {weight.device}; move the input"
        )
    if ids.is_cuda:
        inside = (ids >= 0) & (ids < weight.shape[0])
        torch._assert_async(inside.all(), f"{fqn}: ids are out of range")
    elif ids.numel():
        low, high = (int(bound) for bound in torch.aminmax(ids))
        if low < 0 or high >= weight.shape[0]:
            raise IndexError(
                f"{fqn}: ids from {low} to {high} are out of range for {weight.shape[0]} rows; "
                f"give ids from 0 to {weight.shape[0] - 1}"
            )


class _RotatedEmbedding(Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: DTensor,
        ids: torch.Tensor,
        ring: Ring,
        fqn: str,
        padding_idx: int | None,
        scale_grad_by_freq: bool,
    ) -> torch.Tensor:
        ctx.save_for_backward(ids)
        # Not saved, as for every rotated layer: see `linear`.
        ctx.weight, ctx.written = weight, WriteCheck(weight, fqn, ring)
        ctx.ring, ctx.fqn = ring, fqn
        ctx.padding_idx, ctx.scale_grad_by_freq = padding_idx, scale_grad_by_freq
        with without_autocast(ids.device.type):
            return _forward(ring, fqn, ids, weight)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        refuse_double_backward(ctx.fqn)
        ctx.written.check()
        (ids,) = ctx.saved_tensors
        with without_autocast(dy.device.type):
            dw = _backward(
                ctx.ring,
                ctx.fqn,
                ids.reshape(-1),
                dy.reshape(-1, dy.shape[-1]),
                ctx.weight,
                ctx.padding_idx,
                ctx.scale_grad_by_freq,
            )
        return deliver(ctx.weight, ctx.next_functions[0][0], dw), None, None, None, None, None


def _forward(ring: Ring, fqn: str, ids: torch.Tensor, weight: DTensor) -> torch.Tensor:
    rows, cols = weight.shape
    dtype = ring.precision.compute_dtype(weight.dtype)
    # No view, which autograd would not let anybody change in place.
    y = torch.empty(*ids.shape, cols, dtype=dtype, device=ids.device)
    flat = y.view(ids.numel(), cols)
    lookup = Lookup(ids.reshape(-1), flat, rows, home_rows=len(weight._local_tensor))
    rotate_forward(ring, fqn, weight, dtype, lookup.product, lookup.read)
    return y


def _backward(
    ring: Ring,
    fqn: str,
    ids: torch.Tensor,
    dy: torch.Tensor,
    weight: DTensor,
    padding_idx: int | None,
    scale_grad_by_freq: bool,
) -> Gradient | None:
    sums = RowSums(ids, dy, len(weight), padding_idx, scale_grad_by_freq)
    return rotate_backward(ring, fqn, weight, dy.dtype, None, sums.wgrad)
