"""A rotation by hops: tiles and accumulators go from rank to rank, as ``rotation`` has them.

An accumulator is summed over the ranks in ``accumulator_dtype`` of the ring's precision policy;
every rank scales its part by 1/N as it adds it, so that a sum of N parts overflows no sooner than
their mean; the owner adds its part last.
"""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor

from rtp_wrap.hops import Hop, Lane, Rotation, backward_slots
from rtp_wrap.ops.products import Product, WeightGradient
from rtp_wrap.over_rings import dtype_in_ring
from rtp_wrap.ring import Ring
from rtp_wrap.rotation import Step, schedule
from rtp_wrap.shard import TileGrid, sharded_dim


def forward(ring: Ring, event: str, weight: DTensor, dtype: torch.dtype, product: Product) -> None:
    """``rotate_forward``."""
    home, grid = weight._local_tensor, _grid(weight, ring, dtype, slots=2)
    own = grid.shard(ring.rank)
    with Rotation(ring, event, slots=2) as rotation:
        weights = Lane(rotation, dtype)
        for cell in grid.cells():
            weights.load(home[grid.tile(ring.rank, cell).within(own)])
            for step in schedule(ring.rank, ring.world_size):
                tile = grid.tile(step.tile, cell)
                with rotation.turn(_next_weight(weights, grid, step, cell)):
                    if tile.numel:
                        product(tile, weights.tile)
            weights.release()


def backward(
    ring: Ring,
    event: str,
    weight: DTensor,
    dtype: torch.dtype,
    dgrad: Product | None,
    wgrad: WeightGradient | None,
) -> torch.Tensor | None:
    """``rotate_backward``; weights travel for ``dgrad`` alone."""
    home = weight._local_tensor
    sums = ring.precision.accumulator_dtype(weight.dtype)
    slots, widest = backward_slots(
        dtype, sums, dgrad=dgrad is not None, wgrad=wgrad is not None, overlap=ring.overlap
    )
    grid = _grid(weight, ring, widest, slots)
    own = grid.shard(ring.rank)
    dtype_at_home = dtype_in_ring(weight, ring)
    dw = home.new_empty(home.shape, dtype=dtype_at_home) if wgrad else None
    landing = dw if sums == dtype_at_home else None  # where the last hop can bring an accumulator
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
    return dw


def _next_weight(weights: Lane, grid: TileGrid, step: Step, cell: tuple[int, int]) -> list[Hop]:
    if step.next_tile is None:
        return []
    return [weights.hop(grid.tile_shape(grid.tile(step.next_tile, cell)))]


def _grid(weight: DTensor, ring: Ring, dtype: torch.dtype, slots: int) -> TileGrid:
    """The weight cut so that a tile of ``dtype`` fits one of ``slots`` slots."""
    max_numel = ring.staging.slot_bytes(slots) // dtype.itemsize
    return TileGrid(tuple(weight.shape), sharded_dim(weight), ring.world_size, max_numel)
