"""Where the tiles of a weight lie in the slots of all ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from rtp_wrap.shard import Tile, TileGrid

#: Tiles begin on such an address, bytes, so that GEMMs can read them with wide loads.
ALIGNMENT = 16


Copies = list[tuple[torch.Tensor, torch.Tensor]]


def aligned(nbytes: int) -> int:
    """The room that ``nbytes`` take, so that what follows them is aligned."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class PeerError(RuntimeError):
    """Another rank did not come to a barrier."""


class PeerMemory(Protocol):
    """Memory of the same size on every rank, which all ranks can read."""

    rank: int
    world_size: int

    def of(self, owner: int) -> torch.Tensor:
        """The memory of rank ``owner``, 1-D uint8."""

    def barrier(self, lane: int, flag: int, stream: torch.cuda.Stream | None) -> None:
        """The ranks' work on ``stream`` goes on when all of them have come here.

        ``flag`` is one of 0 to 4, and never the one of the lane's barrier before. May raise
        ``PeerError``.
        """

    def capture(self, stream: torch.cuda.Stream) -> int:
        """The number of the graph that ``stream`` is being captured in; each has its own."""

    def prepared(self, copies: Copies) -> Any:
        """What ``copy`` takes; pairs are (to, from), contiguous, of the same size and dtype."""

    def copy(self, prepared: Any, stream: torch.cuda.Stream | None) -> None:
        """Make the copies on ``stream``, one after the other."""


class Slots(NamedTuple):
    """How many of the largest cell the staging has room for; smaller ones share it.

    For weights, for parts of gradients, and for where the parts of an owner's tile meet.
    """

    weights: int
    parts: int
    landing: int

    def largest_cell(self, staging_bytes: int) -> int:
        """The size of the largest cell in a staging of ``staging_bytes``."""
        return staging_bytes // sum(self) // ALIGNMENT * ALIGNMENT

    def staging_for(self, tile_bytes: int, world_size: int) -> int:
        """The least staging in which tiles of ``tile_bytes``, one per owner, are never cut."""
        return sum(self) * world_size * aligned(tile_bytes)


def slots(*, overlap: bool) -> Slots:
    """One is in use, and others may still read the one before; two more if they come ahead."""
    return Slots(3, 3, 1) if overlap else Slots(2, 2, 1)


def cut(
    shape: tuple[int, ...], dim: int, world_size: int, dtype: torch.dtype, room: int
) -> TileGrid:
    """A weight of ``shape``, sharded along ``dim``, in cells whose tiles fit ``room`` together."""
    return TileGrid(
        shape, dim, world_size, room // world_size // ALIGNMENT * ALIGNMENT // dtype.itemsize
    )


def cells_of(memory: PeerMemory, grid: TileGrid, dtype: torch.dtype) -> list[Cell]:
    """All cells of ``grid``."""
    return [_Places(memory, grid, offset, dtype).cell() for offset in grid.cells()]


def published_cells(
    memory: PeerMemory,
    addresses: torch.Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    room: int,
) -> list[Cell]:
    """A weight of ``shape``, sharded along its rows, in cells whose tiles stay with their owners.

    ``consumed`` of their ``Weights`` is ``Published``. In ``room`` bytes they have one tile, not
    one of each owner: so tiles are larger than those of ``cut``.
    """
    grid = TileGrid(shape, 0, memory.world_size, room // dtype.itemsize)
    return [
        _PublishedPlaces(memory, grid, offset, dtype, addresses).cell() for offset in grid.cells()
    ]


Tiles = list[tuple[Tile, torch.Tensor]]


class Published(Tiles):
    """The tiles of a cell, each where its owner published it: in the memory of that rank.

    For kernels the same in numbers. ``addresses``, int64 ``[ranks]`` on the device, is where the
    memories begin; the tile lies ``at`` so many bytes from there in each. An owner has
    ``shard_rows`` rows of the weight, the last ones fewer or none; the cell is those from ``row``
    of a shard on, ``rows`` of them.
    """

    def __init__(
        self, tiles: Tiles, addresses: torch.Tensor, at: int, shard_rows: int, row: int, rows: int
    ) -> None:
        super().__init__(tiles)
        self.addresses, self.at = addresses, at
        self.shard_rows, self.row, self.rows = shard_rows, row, rows

    def pulled(self) -> Iterator[tuple[Tile, torch.Tensor]]:
        """Copies of the tiles in new memory, one at a time, or of all rows together."""
        first, last = self[0][0], self[-1][0]
        together = Tile(0, last.row_end, first.col, first.col_end)
        if sum(tile.numel for tile, _ in self) == together.numel:
            yield together, torch.cat([values for _, values in self])
        else:
            for tile, values in self:
                yield tile, values.clone()


@dataclass(frozen=True, slots=True)
class Weights:
    """The tiles of a cell. ``consumed`` are one per owner, or the whole weight at once."""

    published: torch.Tensor
    pulls: Any
    consumed: Tiles


@dataclass(frozen=True, slots=True)
class Parts:
    """This rank's parts of the gradients of a cell's tiles."""

    at: int
    produced: Tiles
    own: torch.Tensor


@dataclass(frozen=True, slots=True)
class Landing:
    """Where all ranks' parts of this rank's tile meet, ``[ranks, *tile]``."""

    pulls: Any
    parts: torch.Tensor
    own: torch.Tensor
    other: torch.Tensor  #: of the next rank


class Cell:
    """The tiles of one cell, one of each owner, and where they lie in the memories.

    ``own`` picks this rank's tile out of its home shard; it may be empty, or all of it. Views are
    made once for every place: a training step comes to the same places again.
    """

    def __init__(self, places: _Places, own: Tile, shard: Tile) -> None:
        self.own = own.within(shard)
        self.is_home = own == shard
        self.is_empty = own.numel == 0
        self.nbytes, self.landing_nbytes = places.nbytes, places.landing_nbytes
        self._places = places
        self._weights: dict[int, Weights] = {}
        self._parts: dict[int, Parts] = {}
        self._landings: dict[tuple[int, int], Landing] = {}

    def own_part(self, home: torch.Tensor) -> torch.Tensor:
        """This rank's tile in its home shard, or in something of that shape."""
        return home if self.is_home else home[self.own]

    def weights(self, at: int) -> Weights:
        """The tiles, ``at`` so many bytes in every rank's memory."""
        if at not in self._weights:
            # Views made under inference_mode could not be written to outside it.
            with torch.inference_mode(False):
                self._weights[at] = self._places.weights(at)
        return self._weights[at]

    def parts(self, at: int) -> Parts:
        """Parts of gradients, at the same place on all ranks."""
        if at not in self._parts:
            with torch.inference_mode(False):
                self._parts[at] = self._places.parts(at)
        return self._parts[at]

    def landing(self, at: int, parts_at: int) -> Landing:
        """Where parts that lie at ``parts_at`` meet."""
        key = at, parts_at
        if key not in self._landings:
            with torch.inference_mode(False):
                self._landings[key] = self._places.landing(at, parts_at)
        return self._landings[key]


class _Places:
    """The views of one cell."""

    def __init__(
        self, memory: PeerMemory, grid: TileGrid, offset: tuple[int, int], dtype: torch.dtype
    ) -> None:
        self._memory, self._grid, self._dtype = memory, grid, dtype
        ranks = memory.world_size
        self._tiles = [grid.tile(owner, offset) for owner in range(ranks)]
        self._own_shape = grid.tile_shape(self._tiles[memory.rank])
        # This rank first, then those above it, the next one first.
        self._order = [(memory.rank + turn) % ranks for turn in range(ranks)]
        self._stride = math.prod((*grid.cell, *grid.shape[2:])) * dtype.itemsize
        # Whole shards, of rows, one after the other, are the weight itself.
        self._is_whole = grid.dim == 0 and grid.cell == grid.shard(0).shape
        if not self._is_whole:
            self._stride = aligned(self._stride)
        self.nbytes = aligned(ranks * self._stride)
        self.landing_nbytes = ranks * math.prod(self._own_shape) * dtype.itemsize

    def cell(self) -> Cell:
        me = self._memory.rank
        return Cell(self, self._tiles[me], self._grid.shard(me))

    def weights(self, at: int) -> Weights:
        me, others = self._memory.rank, self._order[1:]
        owners = [owner for owner in others if self._tiles[owner].numel]
        pulls = [(self._place(me, at, o), self._place(o, at, o)) for o in owners]
        return Weights(self._place(me, at, me), self._memory.prepared(pulls), self._consumed(at))

    def parts(self, at: int) -> Parts:
        me = self._memory.rank
        return Parts(at, self._consumed(at), self._place(me, at, me))

    def landing(self, at: int, parts_at: int) -> Landing:
        me = self._memory.rank
        parts = self._view(me, at, (len(self._order), *self._own_shape))
        others = self._order[1:] if self._tiles[me].numel else []
        pulls = [(parts[other], self._place(other, parts_at, me)) for other in others]
        return Landing(self._memory.prepared(pulls), parts, parts[me], parts[self._order[1]])

    def _consumed(self, at: int) -> Tiles:
        """The tiles in this rank's memory that products are made with."""
        me, shape = self._memory.rank, self._grid.shape
        if self._is_whole:
            return [(Tile(0, shape[0], 0, shape[1]), self._view(me, at, shape))]
        tiles = self._tiles
        return [(tiles[o], self._place(me, at, o)) for o in self._order if tiles[o].numel]

    def _place(self, rank: int, at: int, owner: int) -> torch.Tensor:
        """Where the tile of ``owner`` lies in the memory of ``rank``."""
        shape = self._grid.tile_shape(self._tiles[owner])
        return self._view(rank, at + owner * self._stride, shape)

    def _view(self, rank: int, start: int, shape: Sequence[int]) -> torch.Tensor:
        nbytes = math.prod(shape) * self._dtype.itemsize
        return self._memory.of(rank)[start : start + nbytes].view(self._dtype).view(*shape)


class _PublishedPlaces(_Places):
    """The views of one cell whose tiles stay where they were published."""

    def __init__(
        self,
        memory: PeerMemory,
        grid: TileGrid,
        offset: tuple[int, int],
        dtype: torch.dtype,
        addresses: torch.Tensor,
    ) -> None:
        super().__init__(memory, grid, offset, dtype)
        self.nbytes = aligned(self._stride)
        self._addresses, self._row = addresses, offset[0]

    def weights(self, at: int) -> Weights:
        me, tiles, grid = self._memory.rank, self._tiles, self._grid
        places = [(tiles[o], self._place(o, at, o)) for o in range(len(tiles)) if tiles[o].numel]
        published = Published(
            places, self._addresses, at, grid.shard(0).shape[0], self._row, grid.cell[0]
        )
        return Weights(self._place(me, at, me), self._memory.prepared([]), published)

    def _place(self, rank: int, at: int, owner: int) -> torch.Tensor:
        return self._view(owner, at, self._grid.tile_shape(self._tiles[owner]))
