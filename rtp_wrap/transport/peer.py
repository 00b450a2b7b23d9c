"""Tiles pulled from their owners: for ranks that can read each other's memory.

A site's weight is cut into cells (see ``shard``), and a cell's tiles, one of each owner, lie side
by side in a slot. For each cell every rank

1.  *publishes*: copies its own tile from its home shard to its place in the slot, in the dtype of
    the computation,
2.  meets the others (a barrier), which have published then, too,
3.  *pulls* the tiles of the owners above it, the next one first, so that all ranks read from
    different ones at a time.

Gradients go the other way: a rank computes its *part* of the gradient of all tiles of a cell into
a slot, meets the others, and the owner pulls the parts of its tile and averages them, summing in
``reduce_dtype``. Nobody waits for another rank's sum, as in a ring of accumulators, and there is
one rounding, where such a ring has one per rank.

Each of the two is a *lane*: a stream, two slots used in turn, and barriers of its own. Barriers are
all the synchronisation there is between ranks. Barrier k tells that every rank has published cell
k, and, as a lane's work is in order, that it has pulled cell k - 1: so the slot of cell k - 1 may
be written again, for cell k + 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from rtp_wrap.shard import Tile, TileGrid

_WEIGHTS, _GRADIENTS = 0, 1
#: The flag of barriers that are none of a cell's; theirs are 0 and 1, as their slots.
_FENCE = 2
#: Two of weights, two of parts of gradients, one where the parts of an owner's tile meet.
SLOTS = 5
_LANDING = 4
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


def staging_for(tile_bytes: int, world_size: int) -> int:
    """The least staging in which tiles of ``tile_bytes``, one per owner, are never cut."""
    return SLOTS * world_size * (-(-tile_bytes // ALIGNMENT) * ALIGNMENT)


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
    part_pulls: tuple[_Copies, _Copies]
    landing: torch.Tensor

    def own_part(self, home: torch.Tensor) -> torch.Tensor:
        """This rank's tile in its home shard, or in something of that shape."""
        return home if self.is_home else home[self.own]


class _Lane:
    """What is done in order, cell by cell, beside the computation: on a stream if there is one."""

    def __init__(self, stream: torch.cuda.Stream | None) -> None:
        self.stream = stream
        self.count = 0
        # Per slot: the computation may use it; the lane may use it.
        self.ready = [_event(stream), _event(stream)]
        self.free = [_event(stream), _event(stream)]

    def enter(self) -> None:
        """What is enqueued now is the lane's, until ``leave``: a context manager takes longer."""
        if self.stream is not None:
            torch.cuda.set_stream(self.stream)

    def leave(self, computation: torch.cuda.Stream | None) -> None:
        if computation is not None:
            torch.cuda.set_stream(computation)

    def follow(self, stream: torch.cuda.Stream | None) -> None:
        """What comes next is after all that ``stream`` has now."""
        if self.stream is not None and stream is not None:
            self.stream.wait_stream(stream)

    def forget(self) -> None:
        """The events of before belong to another graph, or to none."""
        self.ready = [_event(self.stream), _event(self.stream)]
        self.free = [_event(self.stream), _event(self.stream)]


def _event(stream: torch.cuda.Stream | None) -> torch.cuda.Event | None:
    return None if stream is None else torch.cuda.Event()


class PeerTransport:
    """Publishes, pulls and averages, in ``staging_bytes`` of ``memory``.

    ``overlap=False`` does all of it on the stream of the computation.
    """

    def __init__(
        self, memory: PeerMemory, staging_bytes: int, device: torch.device, *, overlap: bool
    ) -> None:
        self._memory = memory
        self._slot_bytes = slot_bytes(staging_bytes)
        self._device = device
        concurrent = overlap and device.type == "cuda"
        self._lanes = [
            _Lane(torch.cuda.Stream(device, priority=-1) if concurrent else None) for _ in range(2)
        ]
        self._concurrent = concurrent
        self._cells: dict[tuple[torch.Size, int, torch.dtype], list[Cell]] = {}
        #: How many there were.
        self.barriers = 0
        # Whether weights may have been written by work that the lane of weights does not follow.
        self.stale = True
        self._capturing = False

    @property
    def gradient_stream(self) -> torch.cuda.Stream | None:
        """Where gradients are finished, if not on the stream of the computation."""
        return self._lanes[_GRADIENTS].stream

    def cells(self, shape: torch.Size, dim: int, dtype: torch.dtype) -> list[Cell]:
        """A weight of ``shape``, sharded along ``dim``, as tiles of ``dtype``."""
        key = shape, dim, dtype
        cells = self._cells.get(key)
        if cells is None:
            # Views made under inference_mode could not be written to outside it.
            with torch.inference_mode(False):
                self._cells[key] = cells = list(self._cut(tuple(shape), dim, dtype))
        return cells

    def pull(self, home: torch.Tensor, cell: Cell) -> Tiles:
        """The tiles of a cell, once ``release`` was called for those before it."""
        lane, computation = self._lanes[_WEIGHTS], self._computation()
        if self.stale:
            lane.follow(computation)
            self.stale = False
        parity = lane.count & 1
        lane.enter()
        try:
            _wait(lane.stream, lane.free[parity])
            if not cell.is_empty:
                cell.published[parity].copy_(cell.own_part(home))
            self._meet(_WEIGHTS, parity)
            for to, source in cell.pulls[parity]:
                to.copy_(source)
            _record(lane.ready[parity], lane.stream)
        finally:
            lane.leave(computation)
        _wait(computation, lane.ready[parity])
        return cell.tiles[parity]

    def release(self) -> None:
        """The computation has all it needs of the tiles pulled last."""
        lane = self._lanes[_WEIGHTS]
        _record(lane.free[lane.count & 1], self._computation())
        lane.count += 1

    def gradient(self, home: torch.Tensor) -> torch.Tensor:
        """Memory for the gradient of a home shard, of the stream that finishes it."""
        lane = self._lanes[_GRADIENTS]
        computation = self._computation()
        lane.enter()
        try:
            return torch.empty_like(home, memory_format=torch.contiguous_format)
        finally:
            lane.leave(computation)

    def parts(self, cell: Cell) -> Tiles:
        """Where the computation is to write its part of the gradient of a cell's tiles."""
        lane = self._lanes[_GRADIENTS]
        _wait(self._computation(), lane.free[lane.count & 1])
        return cell.parts[lane.count & 1]

    def average(self, cell: Cell, gradient: torch.Tensor, sums: torch.dtype) -> None:
        """Put the mean of all ranks' parts into the home shard's ``gradient``; sum in ``sums``."""
        lane = self._lanes[_GRADIENTS]
        parity, computation = lane.count & 1, self._computation()
        _record(lane.ready[parity], computation)
        lane.enter()
        try:
            _wait(lane.stream, lane.ready[parity])
            self._meet(_GRADIENTS, parity)
            # All ranks have pulled the parts of before.
            _record(lane.free[1 - parity], lane.stream)
            for to, source in cell.part_pulls[parity]:
                to.copy_(source)
            if not cell.is_empty:
                out = cell.own_part(gradient)
                if sums == gradient.dtype:
                    torch.mean(cell.landing, 0, dtype=sums, out=out)
                else:
                    out.copy_(torch.mean(cell.landing, 0, dtype=sums))
        finally:
            lane.leave(computation)
        lane.count += 1

    def begin(self) -> None:
        """Before each site.

        A captured graph cannot wait for events of outside it. And it repeats its cells from the
        same slot on, whichever the last one was: so it begins with a barrier of another flag.
        """
        if self._concurrent:
            capturing = torch.cuda.is_current_stream_capturing()
            if capturing != self._capturing:
                self._capturing, self.stale = capturing, True
                for index, lane in enumerate(self._lanes):
                    lane.forget()
                    if capturing:
                        computation = self._computation()
                        lane.follow(computation)
                        lane.enter()
                        try:
                            self._meet(index, _FENCE)
                        finally:
                            lane.leave(computation)

    def settle(self) -> None:
        """After an exception: what the lanes still do comes before anything else."""
        computation = self._computation()
        if computation is not None:
            for lane in self._lanes:
                if lane.stream is not None:
                    computation.wait_stream(lane.stream)

    def _meet(self, lane: int, flag: int) -> None:
        self.barriers += 1
        self._memory.barrier(lane, flag)

    def _computation(self) -> torch.cuda.Stream | None:
        return torch.cuda.current_stream(self._device) if self._concurrent else None

    def _cut(self, shape: tuple[int, ...], dim: int, dtype: torch.dtype) -> Iterator[Cell]:
        ranks = self._memory.world_size
        room = self._slot_bytes // ranks // ALIGNMENT * ALIGNMENT
        grid = TileGrid(shape, dim, ranks, room // dtype.itemsize)
        for offset in grid.cells():
            yield _Places(self._memory, self._slot_bytes, grid, offset, dtype).cell()


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
                    (landing[reader], self._place(reader, 2 + parity, me))
                    for reader in self._order
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
            parts=(self._consumed(2), self._consumed(3)),
            part_pulls=(part_pulls[0], part_pulls[1]),
            landing=landing,
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


def _record(event: torch.cuda.Event | None, stream: torch.cuda.Stream | None) -> None:
    if event is not None:
        event.record(stream)


def _wait(stream: torch.cuda.Stream | None, event: torch.cuda.Event | None) -> None:
    if stream is not None and event is not None:
        stream.wait_event(event)
