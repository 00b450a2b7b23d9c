"""What a rank sends in one step (a forward and a backward), per strategy: messages and bytes.

For ``N`` ranks, a weight of ``B`` bytes in the dtype that travels and a gradient of ``G`` bytes in
the accumulators' dtype, a rank sends

    Rotate      forward (N-1)/N B; backward (N-1)/N B for dgrad and (N-1)/N G for wgrad, in as many
                hops as the staging cuts a shard into, times N-1 each. Where tiles are pulled, parts
                of gradients travel in the dtype of the computation: (N-1)/N B for wgrad
    Gather      forward (N-1)/N B; backward (N-1)/N B again for dgrad and (N-1)/N G for wgrad: ring
                all-gather and reduce-scatter, whose messages are the backend's
    Replicate   2 (N-1)/N G: ring all-reduce

Where R rings replicate each other, each rank averages what it owns of the gradients of Rotate and
Gather, G/N, with the others: 2 (R-1)/R G/N by ring all-reduce. Those of Replicate are averaged over
all R N ranks.

Rows of an embedding that are read where they lie (see ``ops.lookup``) depend on the batch: what is
counted is the whole table, and all ranks together send no more than that.

Even shards give these numbers exactly; of uneven ones, what this rank sends is counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from rtp_wrap.hops import backward_slots
from rtp_wrap.policy import MixedPrecisionPolicy
from rtp_wrap.shard import TileGrid, local_shape
from rtp_wrap.transport import Staging
from rtp_wrap.transport.cells import cut, slots


@dataclass(frozen=True)
class Traffic:
    """``hops`` are messages of a rotation, ``nbytes`` what they and collectives carry."""

    hops: int = 0
    nbytes: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.hops + other.hops, self.nbytes + other.nbytes)

    def __mul__(self, times: int) -> Traffic:
        return Traffic(self.hops * times, self.nbytes * times)


@dataclass(frozen=True)
class Network:
    """What traffic depends on besides the parameter."""

    world_size: int
    rank: int
    staging_bytes: int
    transport: str
    overlap: bool
    precision: MixedPrecisionPolicy
    replicas: int = 1

    def rotate(
        self, shape: tuple[int, ...], dim: int, dtype: torch.dtype, dgrad: bool, wgrad: bool
    ) -> Traffic:
        compute = self.precision.compute_dtype(dtype)
        sums = self.precision.accumulator_dtype(dtype)
        if self.transport == "peer":
            total = self._pulled(shape, dim, compute, 1 + dgrad, wgrad)
            return total + self._between_rings(shape, dim, sums, wgrad)
        total = self._lane(shape, dim, compute, self._cut(compute, 2), staying=self.rank - 1)
        if dgrad or wgrad:
            slots, widest = backward_slots(
                compute, sums, dgrad=dgrad, wgrad=wgrad, overlap=self.overlap
            )
            cut = self._cut(widest, slots)
            if dgrad:
                total += self._lane(shape, dim, compute, cut, staying=self.rank - 1)
            if wgrad:
                total += self._lane(shape, dim, sums, cut, staying=self.rank)
        return total + self._between_rings(shape, dim, sums, wgrad)

    def _between_rings(
        self, shape: tuple[int, ...], dim: int, sums: torch.dtype, wgrad: bool
    ) -> Traffic:
        own = math.prod(local_shape(shape, dim, self.world_size, self.rank)) * sums.itemsize
        return Traffic(0, round(2 * (self.replicas - 1) * own / self.replicas) if wgrad else 0)

    def _pulled(
        self, shape: tuple[int, ...], dim: int, dtype: torch.dtype, weights: int, wgrad: bool
    ) -> Traffic:
        """What others pull: this rank's tiles ``weights`` times, and its parts for their owners."""
        room = slots(overlap=self.overlap).largest_cell(self.staging_bytes)
        grid = cut(shape, dim, self.world_size, dtype, room)
        total = Traffic()
        for owner in range(self.world_size):
            tiles = [grid.tile(owner, cell) for cell in grid.cells()] if self.world_size > 1 else []
            times = weights * (self.world_size - 1) if owner == self.rank else int(wgrad)
            numel = sum(math.prod(grid.tile_shape(tile)) for tile in tiles)
            hops = sum(1 for tile in tiles if tile.numel)
            total += Traffic(hops, numel * dtype.itemsize) * times
        return total

    def gather(
        self, shape: tuple[int, ...], dim: int, dtype: torch.dtype, dgrad: bool, wgrad: bool
    ) -> Traffic:
        sums = self.precision.accumulator_dtype(dtype)
        # The backend pads to the largest, rank 0's.
        largest = math.prod(local_shape(shape, dim, self.world_size, 0))
        sent = largest * self.precision.compute_dtype(dtype).itemsize * (2 if dgrad else 1)
        if wgrad:
            sent += largest * sums.itemsize
        between = self._between_rings(shape, dim, sums, wgrad)
        return Traffic(0, sent * (self.world_size - 1)) + between

    def replicate(self, shape: tuple[int, ...], dtype: torch.dtype, trained: bool) -> Traffic:
        sums = self.precision.average_dtype(dtype)
        ranks = self.world_size * self.replicas
        share = math.prod(shape) * sums.itemsize / ranks
        return Traffic(0, round(2 * (ranks - 1) * share) if trained else 0)

    def _cut(self, dtype: torch.dtype, slots: int) -> int:
        """How many elements of ``dtype`` a tile may have."""
        return Staging.slot_size(self.staging_bytes, slots) // dtype.itemsize

    def _lane(
        self, shape: tuple[int, ...], dim: int, dtype: torch.dtype, max_numel: int, staying: int
    ) -> Traffic:
        """Every owner's tiles are passed on but those that stay: ``staying`` is their owner."""
        if self.world_size == 1:
            return Traffic()
        grid = TileGrid(shape, dim, self.world_size, max_numel)
        owners = [each for each in range(self.world_size) if each != staying % self.world_size]
        tiles = [grid.tile(owner, cell) for owner in owners for cell in grid.cells()]
        numel = sum(math.prod(grid.tile_shape(tile)) for tile in tiles)
        return Traffic(sum(1 for tile in tiles if tile.numel), numel * dtype.itemsize)
