"""Where the tiles of a weight lie in the slots of all ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from rtp_wrap.shard import Tile, TileGrid

#: Two of weights, two of parts of gradients, one where the parts of an owner's tile meet.
SLOTS = 5
_PARTS, _LANDING = 2, 4
#: Tiles and slots begin on such an address, bytes, so that GEMMs can read them with wide loads.
ALIGNMENT = 16


class PeerError(RuntimeError):
    """Another rank did not come to a barrier."""


class PeerMemory(Protocol):
    """Memory of the same size on every rank, which all ranks can read."""

    rank: int
    world_size: int

    def of(self, owner: int) -> torch.Tensor:
        """The memory of rank ``owner``, 1-D uint8."""

    def barrier(self, lane: int, flag: int) -> None:
        """The ranks' work on the current stream goes on when all of them have come here.

        ``flag`` is 0, 1 or 2, and never the one of the lane's barrier before. May raise
        ``PeerError``.
        """


def slot_bytes(staging_bytes: int) -> int:
    """The size of a slot of a staging of ``staging_bytes``."""
    return staging_bytes // SLOTS // ALIGNMENT * ALIGNMENT


def cut(
    shape: tuple[int, ...], dim: int, world_size: int, dtype: torch.dtype, staging_bytes: int
) -> TileGrid:
    """A weight of ``shape``, sharded along ``dim``, in cells whose tiles fit a slot together."""
    room = slot_bytes(staging_bytes) // world_size // ALIGNMENT * ALIGNMENT
    return TileGrid(shape, dim, world_size, room // dtype.itemsize)


def staging_for(tile_bytes: int, world_size: int) -> int:
    """The least staging in which tiles of ``tile_bytes``, one per owner, are never cut."""
    return SLOTS * world_size * (-(-tile_bytes // ALIGNMENT) * ALIGNMENT)


def cells_of(
    memory: PeerMemory, grid: TileGrid, dtype: torch.dtype, staging_bytes: int
) -> list[Cell]:
    """All cells of ``grid``, as views of the memories."""
    size = slot_bytes(staging_bytes)
    return [_Places(memory, size, grid, offset, dtype).cell() for offset in grid.cells()]


Tiles = list[tuple[Tile, torch.Tensor]]
_Copies = list[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class Cell:
    """The tiles of one cell, and where they lie; pairs are of the two slots that are used in turn.

    ``own`` picks this rank's tile out of its home shard; it may be empty, or all of it. ``tiles``
    are what is consumed: one per owner, or the whole weight where they make it up without a gap.
    """

    own: tuple[slice, slice]
    is_home: bool
    is_empty: bool
    published: tuple[torch.Tensor, torch.Tensor]
    pulls: tuple[_Copies, _Copies]
    tiles: tuple[Tiles, Tiles]
    parts: tuple[Tiles, Tiles]
    own_parts: tuple[torch.Tensor, torch.Tensor]
    part_pulls: tuple[_Copies, _Copies]
    landing: torch.Tensor
    own_landing: torch.Tensor

    def own_part(self, home: torch.Tensor) -> torch.Tensor:
        """This rank's tile in its home shard, or in something of that shape."""
        return home if self.is_home else home[self.own]


class _Places:
    """Where the tiles of one cell lie in the slots of all ranks."""

    def __init__(
        self,
        memory: PeerMemory,
        slot_bytes: int,
        grid: TileGrid,
        offset: tuple[int, int],
        dtype: torch.dtype,
    ) -> None:
        self._memory, self._slot_bytes, self._grid, self._dtype = memory, slot_bytes, grid, dtype
        ranks = memory.world_size
        self._tiles = [grid.tile(owner, offset) for owner in range(ranks)]
        # This rank first, then those above it, the next one first.
        self._order = [(memory.rank + turn) % ranks for turn in range(ranks)]
        self._stride = math.prod((*grid.cell, *grid.shape[2:])) * dtype.itemsize
        # Whole shards, of rows, one after the other, are the weight itself.
        self._is_whole = grid.dim == 0 and grid.cell == grid.shard(0).shape
        if not self._is_whole:
            self._stride = -(-self._stride // ALIGNMENT) * ALIGNMENT

    def cell(self) -> Cell:
        me, tiles = self._memory.rank, self._tiles
        own = tiles[me]
        landing = self._view(me, _LANDING, 0, (len(tiles), *self._grid.tile_shape(own)))
        pulls, part_pulls = [], []
        for parity in (0, 1):
            pulls.append(
                [
                    (self._place(me, parity, owner), self._place(owner, parity, owner))
                    for owner in self._order[1:]
                    if tiles[owner].numel
                ]
            )
            part_pulls.append(
                [
                    (landing[other], self._place(other, _PARTS + parity, me))
                    for other in self._order[1:]
                    if own.numel
                ]
            )
        return Cell(
            own=own.within(self._grid.shard(me)),
            is_home=own == self._grid.shard(me),
            is_empty=own.numel == 0,
            published=(self._place(me, 0, me), self._place(me, 1, me)),
            pulls=(pulls[0], pulls[1]),
            tiles=(self._consumed(0), self._consumed(1)),
            parts=(self._consumed(_PARTS), self._consumed(_PARTS + 1)),
            own_parts=(self._place(me, _PARTS, me), self._place(me, _PARTS + 1, me)),
            part_pulls=(part_pulls[0], part_pulls[1]),
            landing=landing,
            own_landing=landing[me],
        )

    def _consumed(self, slot: int) -> Tiles:
        """The tiles of this rank's slot that products are made with."""
        me, shape = self._memory.rank, self._grid.shape
        if self._is_whole:
            return [(Tile(0, shape[0], 0, shape[1]), self._view(me, slot, 0, shape))]
        tiles = self._tiles
        return [(tiles[o], self._place(me, slot, o)) for o in self._order if tiles[o].numel]

    def _place(self, rank: int, slot: int, owner: int) -> torch.Tensor:
        """Where the tile of ``owner`` lies in a slot of ``rank``."""
        shape = self._grid.tile_shape(self._tiles[owner])
        return self._view(rank, slot, owner * self._stride, shape)

    def _view(self, rank: int, slot: int, at: int, shape: Sequence[int]) -> torch.Tensor:
        start = slot * self._slot_bytes + at
        nbytes = math.prod(shape) * self._dtype.itemsize
        return self._memory.of(rank)[start : start + nbytes].view(self._dtype).view(*shape)
