"""One rotation, forward or backward: tiles pass, and an op's products are made of them.

The loop is the same for every layer. What differs is a function of one tile: its rectangle of the
weight (see ``shard``) and its values, of shape ``[rows, cols, ...]``.

    product(tile, values)          forward: add what this tile gives to the output
    dgrad(tile, values)            backward: add what it gives to the gradient of the input
    wgrad(tile, start, out, scale) backward: out = start + scale * (this rank's part of the tile's
                                   gradient), where ``start`` may be ``out`` or None for zero

An accumulator is summed over the ranks in ``accumulator_dtype`` of the ring's precision policy;
every rank scales its part by 1/N as it adds it, so that a sum of N parts overflows no sooner than
their mean; the owner adds its part last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.distributed.tensor import DTensor, Shard

from rtp_wrap.hops import Hop, Lane, Rotation, backward_slots
from rtp_wrap.ring import Ring
from rtp_wrap.rotation import Step, schedule
from rtp_wrap.shard import Tile, TileGrid

Product = Callable[[Tile, torch.Tensor], None]
WeightGradient = Callable[[Tile, torch.Tensor | None, torch.Tensor, float], None]


def rotate_forward(
    ring: Ring, fqn: str, weight: DTensor, dtype: torch.dtype, product: Product
) -> None:
    """Call ``product`` with every tile of ``weight``, in ``dtype``, on every rank."""
    home, grid = weight._local_tensor, _grid(weight, ring, dtype, slots=2)
    own = grid.shard(ring.rank)
    with Rotation(ring, f"{fqn} forward", slots=2) as rotation:
        weights = Lane(rotation, dtype)
        for cell in grid.cells():
            weights.load(home[grid.tile(ring.rank, cell).within(own)])
            for step in schedule(ring.rank, ring.world_size):
                tile = grid.tile(step.tile, cell)
                with rotation.turn(_next_weight(weights, grid, step, cell)):
                    if tile.numel:
                        product(tile, weights.tile)
            weights.release()


def rotate_backward(
    ring: Ring,
    fqn: str,
    weight: DTensor,
    dtype: torch.dtype,
    dgrad: Product | None,
    wgrad: WeightGradient | None,
) -> DTensor | None:
    """Call ``dgrad`` with every tile, and ``wgrad`` for every tile's accumulator; returns ``dW``.

    Either may be ``None`` where its result is not needed: weights travel for ``dgrad`` alone.
    """
    home = weight._local_tensor
    sums = ring.precision.accumulator_dtype(weight.dtype)
    slots, widest = backward_slots(
        dtype, sums, dgrad=dgrad is not None, wgrad=wgrad is not None, overlap=ring.overlap
    )
    grid = _grid(weight, ring, widest, slots)
    own = grid.shard(ring.rank)
    dw = home.new_empty(home.shape) if wgrad else None
    landing = dw if sums == weight.dtype else None  # where the last hop can bring an accumulator
    event = f"{fqn} backward ({'dx' if dgrad else ''} {'dw' if wgrad else ''})"
    with Rotation(ring, event, slots) as rotation:
        weights, accumulators = Lane(rotation, dtype), Lane(rotation, sums)
        for cell in grid.cells():
            at_home = grid.tile(ring.rank, cell).within(own)
            if dgrad is not None:
                weights.load(home[at_home])
            for step in schedule(ring.rank, ring.world_size):
                hops = [] if dgrad is None else _next_weight(weights, grid, step, cell)
                gaining = grid.tile(step.accumulator, cell)
                if wgrad is not None and not step.first:
                    into = landing[at_home] if step.last and landing is not None else None
                    hops.append(accumulators.hop(grid.tile_shape(gaining), into))
                tile = grid.tile(step.tile, cell)
                with rotation.turn(hops):
                    if dgrad is not None and tile.numel:
                        dgrad(tile, weights.tile)
                if wgrad is not None and dw is not None:
                    if step.first:
                        accumulators.start(grid.tile_shape(gaining))
                    if gaining.numel:
                        start = None if step.first else accumulators.tile
                        home_now = step.last and landing is not None
                        out = dw[at_home] if home_now else accumulators.tile
                        wgrad(gaining, start, out, 1 / ring.world_size)
                        if step.last and not home_now:
                            dw[at_home] = accumulators.tile
            weights.release()
            accumulators.release()
    if dw is None:
        return None
    return DTensor.from_local(
        dw,
        weight.device_mesh,
        weight.placements,
        run_check=False,
        shape=weight.shape,
        stride=weight.stride(),
    )


def in_layers_dtype(
    ring: Ring, fqn: str, weight: DTensor, xs: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """The inputs in the dtype of the layer's products; ``TypeError`` if they have another one.

    That dtype is the precision policy's for the weight, or autocast's, which casts inputs itself.
    """
    kind = xs[0].device.type
    castable = all(x.is_floating_point() and x.dtype != torch.float64 for x in xs)
    if torch.is_autocast_enabled(kind) and castable:
        dtype = torch.get_autocast_dtype(kind)
        return [x.to(dtype) for x in xs]
    dtype = ring.precision.compute_dtype(weight.dtype)
    for x in xs:
        if x.dtype != dtype:
            raise TypeError(
                f"{fqn}: input is {x.dtype} but the layer computes in {dtype}; convert the input, "
                f"or use torch.autocast or a MixedPrecisionPolicy"
            )
    return list(xs)


def add_scaled(
    start: torch.Tensor | None, part: torch.Tensor, scale: float, *, out: torch.Tensor
) -> None:
    """``out = start + scale * part`` in the precision of ``out``; ``start`` may be ``out``."""
    part = part.to(out.dtype)
    if start is None:
        torch.mul(part, scale, out=out)
    else:
        torch.add(start, part, alpha=scale, out=out)


def _next_weight(weights: Lane, grid: TileGrid, step: Step, cell: tuple[int, int]) -> list[Hop]:
    if step.next_tile is None:
        return []
    return [weights.hop(grid.tile_shape(grid.tile(step.next_tile, cell)))]


def _grid(weight: DTensor, ring: Ring, dtype: torch.dtype, slots: int) -> TileGrid:
    """The weight cut so that a tile of ``dtype`` fits one of ``slots`` slots."""
    (placement,) = weight.placements
    assert isinstance(placement, Shard)
    max_numel = ring.staging.slot_bytes(slots) // dtype.itemsize
    return TileGrid(tuple(weight.shape), placement.dim, ring.world_size, max_numel)
