r"""Linear over a rotating weight.

Shapes, for ``T`` tokens of this rank, ``I`` input and ``O`` output features, ``N`` ranks:

    x  [T, I]      input, this rank's own tokens      dy [T, O]
    W  [O, I]      weight; this rank holds W_r, its rows (dim 0) or columns (dim 1)
    b  [O]         bias, whole                        y  [T, O]

The weight is a set of tiles ``W[R, C]`` (rows ``R``, columns ``C``; see ``shard``), each of which
passes every rank once in forward and once in backward:

    forward    y[:, R] (+)= x[:, C] @ W[R, C]^T (+ b[R])
    dgrad      dx[:, C] (+)= dy[:, R] @ W[R, C]
    wgrad      dW[R, C] = 1/N * sum over ranks k of dy_k[:, R]^T @ x_k[:, C]
    dbias      db = sum over T of dy                  averaged by whoever owns the bias

Sharded along dim 0, a tile has all columns, so each output element is one full-length dot product,
and dgrad sums over tiles; along dim 1 it is the other way round. Sums over tiles happen in the
GEMM's epilogue (beta = 1) in the dtype of the result. A wgrad is summed in an accumulator that
visits every rank, in the dtype of the parameter; every rank scales its part by 1/N (alpha) as it
adds it, so that a sum of N parts overflows no sooner than their mean; the owner adds its part last.

dtypes: GEMMs run in x's dtype, which is the weight's own, or autocast's; tiles travel in it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor, Shard

from rtp_wrap.double_backward import refuse_double_backward
from rtp_wrap.hops import Hop, Lane, Rotation
from rtp_wrap.ring import Ring, resolve
from rtp_wrap.rotation import Step, schedule
from rtp_wrap.shard import TileGrid
from rtp_wrap.written import WriteCheck


def rotated_linear(
    x: torch.Tensor, weight: DTensor, bias: torch.Tensor | None, ring: str, fqn: str
) -> torch.Tensor:
    """``x @ weight^T + bias`` for a weight whose shards stay at home and rotate as tiles.

    ``x`` is ``[..., I]``, this rank's own; ``weight`` a DTensor ``[O, I]``, ``Shard(0)`` or
    ``Shard(1)`` over the ring; ``bias`` a plain ``[O]`` or ``None``; ``ring`` a ring's key; ``fqn``
    names the layer in errors. Returns ``[..., O]`` in the dtype of the GEMM. All ranks of the ring
    must call it together. The gradient of ``weight`` is averaged over ranks and sharded like it;
    that of ``bias`` is this rank's own.

    Raises ``ValueError`` or ``TypeError`` for shapes or dtypes that do not match, before any
    communication.
    """
    features = weight.shape[1]
    if x.dim() == 0 or x.shape[-1] != features:
        raise ValueError(
            f"{fqn}: input of shape {tuple(x.shape)} does not end in the layer's {features} input "
            f"features"
        )
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.is_floating_point() and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        x = x.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    elif x.dtype != weight.dtype:
        raise TypeError(
            f"{fqn}: input is {x.dtype} but the layer is {weight.dtype}; convert the input, or use "
            f"torch.autocast"
        )
    y: torch.Tensor = _RotatedLinear.apply(x, weight, bias, ring, fqn)
    return y


class _RotatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: DTensor, bias: torch.Tensor | None, key: str, fqn: str
    ) -> torch.Tensor:
        ring = resolve(key)
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None)
        ctx.shape = x.shape
        # Not saved: the home shard is the parameter's own memory, and a change of it between
        # forward and backward is found by its versions, with an error that names the layer.
        ctx.weight, ctx.written = weight, WriteCheck(weight, fqn, ring)
        ctx.ring, ctx.fqn = ring, fqn
        with torch.autocast(x.device.type, enabled=False):
            y = _forward(ring, fqn, x.reshape(-1, x.shape[-1]), weight, bias)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        refuse_double_backward(ctx.fqn)
        ctx.written.check()
        (x,) = ctx.saved_tensors
        needs_dx, _, needs_db = ctx.needs_input_grad[:3]
        x = None if x is None else x.reshape(-1, x.shape[-1])  # [T, I]
        dy = dy.reshape(-1, dy.shape[-1])  # [T, O]
        with torch.autocast(dy.device.type, enabled=False):
            dx, dw = _backward(ctx.ring, ctx.fqn, x, dy, ctx.weight, needs_dx)
            db = dy.sum(0) if needs_db else None
        return None if dx is None else dx.view(ctx.shape), dw, db, None, None


def _forward(
    ring: Ring, fqn: str, x: torch.Tensor, weight: DTensor, bias: torch.Tensor | None
) -> torch.Tensor:
    home, grid = weight._local_tensor, _grid(weight, ring, x.dtype, slots=2)
    y = x.new_empty(x.shape[0], weight.shape[0])
    begun: set[int] = set()  # rows of the weight whose outputs hold a sum already
    with Rotation(ring, f"{fqn} forward", slots=2) as rotation:
        weights = Lane(rotation, x.dtype)
        for cell in grid.cells():
            weights.load(home[grid.tile(ring.rank, cell).within(grid.shard(ring.rank))])
            for step in schedule(ring.rank, ring.world_size):
                tile = grid.tile(step.tile, cell)
                with rotation.turn(_next_weight(weights, grid, step, cell)):
                    if tile.numel:
                        out = y[:, tile.rows]
                        first = None if bias is None else bias[tile.rows]
                        start = out if tile.row in begun else first
                        _add_product(start, x[:, tile.cols], weights.tile.t(), out=out)
                        begun.add(tile.row)
            weights.release()
    return y


def _backward(
    ring: Ring,
    fqn: str,
    x: torch.Tensor | None,
    dy: torch.Tensor,
    weight: DTensor,
    needs_dx: bool,
) -> tuple[torch.Tensor | None, DTensor | None]:
    """``dx`` if it is needed, and ``dW`` if there is an ``x`` to make it of."""
    home, needs_dw = weight._local_tensor, x is not None
    slots = 2 if not (needs_dx and needs_dw) else 4 if ring.overlap else 3
    grid = _grid(weight, ring, weight.dtype if needs_dw else dy.dtype, slots)
    own = grid.shard(ring.rank)
    dx = dy.new_empty(dy.shape[0], weight.shape[1]) if needs_dx else None
    dw = home.new_empty(home.shape) if needs_dw else None
    begun: set[int] = set()  # columns of the weight whose part of dx holds a sum already
    event = f"{fqn} backward ({'dx' if needs_dx else ''} {'dw' if needs_dw else ''})"
    with Rotation(ring, event, slots) as rotation:
        weights, accumulators = Lane(rotation, dy.dtype), Lane(rotation, weight.dtype)
        for cell in grid.cells():
            at_home = grid.tile(ring.rank, cell).within(own)
            if needs_dx:
                weights.load(home[at_home])
            for step in schedule(ring.rank, ring.world_size):
                hops = _next_weight(weights, grid, step, cell) if needs_dx else []
                gaining = grid.tile(step.accumulator, cell)
                if dw is not None and not step.first:
                    into = dw[at_home] if step.last else None
                    hops.append(accumulators.hop(gaining, into))
                tile = grid.tile(step.tile, cell)
                with rotation.turn(hops):
                    if dx is not None and tile.numel:
                        out = dx[:, tile.cols]
                        start = out if tile.col in begun else None
                        _add_product(start, dy[:, tile.rows], weights.tile, out=out)
                        begun.add(tile.col)
                if dw is not None and x is not None:
                    if step.first:
                        accumulators.start(gaining.shape)
                    if gaining.numel:
                        _add_product(
                            None if step.first else accumulators.tile,
                            dy[:, gaining.rows].t(),
                            x[:, gaining.cols],
                            out=dw[at_home] if step.last else accumulators.tile,
                            scale=1 / ring.world_size,
                        )
            weights.release()
            accumulators.release()
    if dw is None:
        return dx, None
    return dx, DTensor.from_local(
        dw,
        weight.device_mesh,
        weight.placements,
        run_check=False,
        shape=weight.shape,
        stride=weight.stride(),
    )


def _next_weight(weights: Lane, grid: TileGrid, step: Step, cell: tuple[int, int]) -> list[Hop]:
    return [] if step.next_tile is None else [weights.hop(grid.tile(step.next_tile, cell))]


def _grid(weight: DTensor, ring: Ring, dtype: torch.dtype, slots: int) -> TileGrid:
    """The weight cut so that a tile of ``dtype`` fits one of ``slots`` slots."""
    (placement,) = weight.placements
    assert isinstance(placement, Shard)
    rows, cols = weight.shape
    max_numel = ring.staging.slot_bytes(slots) // dtype.itemsize
    return TileGrid((rows, cols), placement.dim, ring.world_size, max_numel)


def _add_product(
    start: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    out: torch.Tensor,
    scale: float = 1.0,
) -> None:
    """``out = start + scale * (a @ b)`` in one GEMM; ``start`` may be ``out`` itself.

    ``out`` may be wider than ``a`` and ``b`` (an fp32 accumulator of bf16 products): then the
    product is added in ``out``'s precision.
    """
    # beta = 0 means that start is not read.
    start, beta = (out, 0) if start is None else (start, 1)
    if out.dtype == a.dtype:
        torch.addmm(start, a, b, beta=beta, alpha=scale, out=out)
    elif a.is_cuda and out.dtype == torch.float32:
        torch.addmm(start, a, b, out_dtype=out.dtype, beta=beta, alpha=scale, out=out)
    else:  # there is no GEMM with this wider result
        product = torch.mm(a, b).to(out.dtype)
        if beta == 0:
            torch.mul(product, scale, out=out)
        else:
            torch.add(start, product, alpha=scale, out=out)
