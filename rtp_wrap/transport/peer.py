"""Tiles pulled from their owners: for ranks that can read each other's memory.

A site's weight is cut into cells (see ``shard``), and a cell's tiles, one of each owner, lie side
by side. For each cell every rank

1.  *publishes*: copies its own tile from its home shard to its place, in the dtype of the
    computation,
2.  meets the others (a barrier), which have published then, too,
3.  *pulls* the tiles of the owners above it, the next one first, so that all ranks read from
    different ones at a time.

Gradients go the other way: a rank computes its *part* of the gradient of all tiles of a cell, meets
the others, and the owner pulls the parts of its tile and averages them, summing in
``reduce_dtype``. Nobody waits for another rank's sum, as in a ring of accumulators, and there is
one rounding, where such a ring has one per rank.

Each of the two has a *lane*: a stream, barriers of its own, and an area of the staging in which
cells lie one behind the other. Barriers are all the synchronisation there is between ranks. Barrier
k tells that every rank has published cell k, and, as a lane's work is in order, that it has pulled
cell k - 1: so others may lie there from cell k + 1 on.

Of a table of embeddings a rank needs few rows, and which ones is known when it comes to it. Such a
cell is published, and the ranks meet, but instead of pulling each of them *reads* what it needs
from the memories of the owners. How much may differ from rank to rank; cells and barriers must not.
By barrier k + 1 a rank must have read cell k, too. So it reads on the stream of the computation,
and publishes cell k + 1 there after that, be it of the same table or of what comes next; and no
rank fetches such a cell ahead.

On a GPU the lanes have nothing but barriers and pulls, which take no multiprocessor. Copies within
a GPU do: a large GEMM leaves none free until it ends, and would hold up a lane with such a copy. So
a cell is published by the computation's own stream, two cells ahead of its use, and averages, which
nothing waits for but who takes the gradient, have a stream of their own. Two cells ahead, and three
slots in an area, so that a rank can be late by about a layer before another one waits for it: ranks
run apart by a millisecond and together again all the time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from rtp_wrap.transport.area import WINDOW, Area
from rtp_wrap.transport.cells import (
    LANDING,
    PARTS,
    WEIGHTS,
    Cell,
    Landing,
    Parts,
    PeerMemory,
    Published,
    Tiles,
    cells_of,
    cut,
    largest_cell,
    published_cells,
)
from rtp_wrap.transport.foresight import Context, Foresight, Visit
from rtp_wrap.versions import versions_of

#: The flag of barriers that are none of a cell's; theirs are 0 and 1, in turn.
_FENCE = 2


@dataclass(frozen=True, slots=True)
class _Fetched:
    """A cell that is there, or on its way."""

    visit: Visit
    index: int
    context: Context
    versions: tuple[int, int]
    tiles: Tiles
    come: torch.cuda.Event | None


class _Events:
    """One for each of the last cells."""

    def __init__(self) -> None:
        self._events = [torch.cuda.Event() for _ in range(WINDOW)]

    def of(self, number: int) -> torch.cuda.Event:
        return self._events[number % WINDOW]


class _Lane:
    """What is done in order, cell by cell, beside the computation: on a stream if there is one."""

    def __init__(self, index: int, stream: torch.cuda.Stream | None, area: Area) -> None:
        self.index, self.stream, self.area = index, stream, area
        self.number = -1
        #: Whether the last cell is part of a graph.
        self.captured = False
        self.forget()

    def forget(self) -> None:
        """The events of before belong to another graph, or to none, and all of them are over."""
        self.area.forget()
        if self.stream is not None:
            #: The computation has put something there; all ranks have met; all pulls have come.
            self.given, self.met, self.come = _Events(), _Events(), _Events()


class PeerTransport:
    """Publishes, pulls and averages, in ``staging_bytes`` of ``memory``.

    ``overlap=False`` does all of it on the stream of the computation.
    """

    def __init__(
        self, memory: PeerMemory, staging_bytes: int, device: torch.device, *, overlap: bool
    ) -> None:
        self._memory = memory
        self._staging_bytes = staging_bytes
        self._device = device
        self._overlap = overlap
        self._concurrent = overlap and device.type == "cuda"
        room = largest_cell(staging_bytes)
        self._weights = _Lane(0, self._stream(), Area(0, room, WEIGHTS))
        self._gradients = _Lane(1, self._stream(), Area(WEIGHTS * room, room, PARTS))
        self._landings = Area((WEIGHTS + PARTS) * room, room, LANDING)
        #: Where gradients are finished, if not on the stream of the computation.
        self.gradient_stream = self._stream()
        if self._concurrent:
            self._averaged = _Events()
        self._cells: dict[tuple[torch.Size, int, torch.dtype], list[Cell]] = {}
        self._published: dict[tuple[torch.Size, torch.dtype], list[Cell]] = {}
        starts = [memory.of(owner).data_ptr() for owner in range(memory.world_size)]
        self._addresses = torch.tensor(starts, dtype=torch.int64, device=device)
        self._foresight = Foresight()
        self._ahead: deque[_Fetched] = deque()
        #: How many there were.
        self.barriers = 0

    def cells(self, shape: torch.Size, dim: int, dtype: torch.dtype) -> list[Cell]:
        """A weight of ``shape``, sharded along ``dim``, as tiles of ``dtype``."""
        key = shape, dim, dtype
        cells = self._cells.get(key)
        if cells is None:
            grid = cut(tuple(shape), dim, self._memory.world_size, dtype, self._staging_bytes)
            self._cells[key] = cells = cells_of(self._memory, grid, dtype)
        return cells

    def published(self, shape: torch.Size, dtype: torch.dtype) -> list[Cell]:
        """A weight of ``shape``, sharded along its rows, as tiles of ``dtype`` to be ``read``."""
        key = shape, dtype
        cells = self._published.get(key)
        if cells is None:
            self._published[key] = cells = published_cells(
                self._memory, self._addresses, tuple(shape), dtype, self._staging_bytes
            )
        return cells

    def begin_forward(self) -> None:
        """An outermost forward begins."""
        self._foresight.begin()

    def read(self, visit: Visit, index: int, read: Callable[[Published], None]) -> None:
        """Have ``read`` take what it needs of the tiles of a cell, out of their owners' memories.

        It is called once, and reads on the stream of the computation. ``visit.reads``, and its
        cells are ``published`` ones.
        """
        self._come_to(visit, index)
        self._ahead.clear()
        now = self._fetch(visit, index, self._foresight.context)
        if now.come is not None:
            torch.cuda.current_stream(self._device).wait_event(now.come)
        assert isinstance(now.tiles, Published)
        read(now.tiles)
        if index + 1 == len(visit.cells):
            self._look_ahead(now)

    def pull(self, visit: Visit, index: int) -> Tiles:
        """The tiles of a cell, valid until the next call; those after it are fetched as well."""
        begun = self._come_to(visit, index)
        if self._ahead and not begun and _is_of(self._ahead[0], visit, index):
            now = self._ahead.popleft()
        else:
            self._ahead.clear()
            now = self._fetch(visit, index, self._foresight.context)
        self._look_ahead(now)
        if now.come is not None:
            torch.cuda.current_stream(self._device).wait_event(now.come)
        return now.tiles

    def _come_to(self, visit: Visit, index: int) -> bool:
        """This cell is next; whether it is the first since an outermost forward began."""
        begun = self._foresight.begun
        if begun:
            for area in (self._weights.area, self._gradients.area, self._landings):
                area.rewind()
        if index == 0:
            self._foresight.visit(visit)
        return begun

    def _look_ahead(self, now: _Fetched) -> None:
        while self._overlap and len(self._ahead) < WEIGHTS - 1:
            last = self._ahead[-1] if self._ahead else now
            if last.index + 1 < len(last.visit.cells):
                fetched = self._fetch(last.visit, last.index + 1, last.context)
            else:
                upcoming = self._foresight.after(last.context)
                if upcoming is None or upcoming.reads:
                    return
                fetched = self._fetch(upcoming, 0, (last.context[1], upcoming.event))
            self._ahead.append(fetched)

    def _fetch(self, visit: Visit, index: int, context: Context) -> _Fetched:
        """Publish this rank's tile of a cell, and pull those of the others."""
        lane, cell, computation = self._weights, visit.cells[index], self._computation()
        number = self._next(lane)
        at, before = lane.area.take(cell.nbytes, number)
        self._wait_for_peers(lane, before)
        weights = cell.weights(at)
        if not cell.is_empty:
            weights.published.copy_(cell.own_part(visit.weight._local_tensor))
        come = None
        if computation is not None and lane.stream is not None:
            # The computation is done with what was there before: it published after that.
            lane.given.of(number).record(computation)
            lane.stream.wait_event(lane.given.of(number))
        self._meet(lane, number & 1)
        if lane.stream is not None:
            lane.met.of(number).record(lane.stream)
        self._memory.copy(weights.pulls, lane.stream)
        if lane.stream is not None:
            come = lane.come.of(number)
            come.record(lane.stream)
        versions = versions_of(visit.weight)
        return _Fetched(visit, index, context, versions, weights.consumed, come)

    def gradient(self, home: torch.Tensor) -> torch.Tensor:
        """Memory for the gradient of a home shard, to be finished on ``gradient_stream``."""
        gradient = torch.empty_like(home, memory_format=torch.contiguous_format)
        if self.gradient_stream is not None:
            # The memory is the computation's, as activations leave it room in backward. Autograd
            # may drop it, having added it to another, before that stream is done with it.
            gradient.record_stream(self.gradient_stream)
        return gradient

    def parts(self, cell: Cell) -> Parts:
        """Where the computation is to write its part of the gradient of a cell's tiles."""
        lane, computation = self._gradients, self._computation()
        number = self._next(lane)
        at, before = lane.area.take(cell.nbytes, number)
        self._wait_for_peers(lane, before)
        if computation is not None:
            computation.wait_event(self._averaged.of(before))  # this rank's own part
        return cell.parts(at)

    def average(self, cell: Cell, parts: Parts, gradient: torch.Tensor, sums: torch.dtype) -> None:
        """Put the mean of all ranks' parts into the home shard's ``gradient``; sum in ``sums``."""
        lane, computation, finish = self._gradients, self._computation(), self.gradient_stream
        number = lane.number
        at, before = self._landings.take(cell.landing_nbytes, number)
        landing = cell.landing(at, parts.at)
        if computation is None or lane.stream is None or finish is None:
            self._meet(lane, number & 1)
            self._memory.copy(landing.pulls, None)
            _mean(cell, parts, landing, gradient, sums)
            return
        lane.given.of(number).record(computation)
        lane.stream.wait_event(lane.given.of(number))
        self._meet(lane, number & 1)
        lane.met.of(number).record(lane.stream)
        lane.stream.wait_event(self._averaged.of(before))
        self._memory.copy(landing.pulls, lane.stream)
        lane.come.of(number).record(lane.stream)
        finish.wait_event(lane.come.of(number))
        torch.cuda.set_stream(finish)  # a context manager takes longer
        try:
            _mean(cell, parts, landing, gradient, sums)
        finally:
            torch.cuda.set_stream(computation)
        self._averaged.of(number).record(finish)

    def settle(self) -> None:
        """After an exception: what is still under way comes before anything else."""
        self._foresight.begin()
        self._ahead.clear()
        computation = self._computation()
        if computation is not None:
            for stream in (self._weights.stream, self._gradients.stream, self.gradient_stream):
                assert stream is not None
                computation.wait_stream(stream)

    def _next(self, lane: _Lane) -> int:
        """The number of a new cell."""
        if self._concurrent and torch.cuda.is_current_stream_capturing() != lane.captured:
            self._follow_capture(lane)
        lane.number += 1
        return lane.number

    def _follow_capture(self, lane: _Lane) -> None:
        """Begin anew inside a graph that is being captured, and after it.

        A captured graph cannot wait for events of outside it. And it repeats its cells in the same
        places and with the same flags, whichever came last: so it begins with a fence.
        """
        lane.captured = not lane.captured
        lane.forget()
        if lane is self._gradients:
            self._landings.forget()
            self._averaged = _Events()
        self._fence(lane)

    def _wait_for_peers(self, lane: _Lane, before: int) -> None:
        """What lay in a new cell's place until now, the cell ``before``, has been pulled by all."""
        assert before + 1 < lane.number
        if self._concurrent:
            torch.cuda.current_stream(self._device).wait_event(lane.met.of(before + 1))

    def _fence(self, lane: _Lane) -> None:
        """A barrier that is none of a cell's: all pulls of before it are over."""
        computation = self._computation()
        if computation is not None and lane.stream is not None:
            lane.stream.wait_stream(computation)
            self._meet(lane, _FENCE)
            computation.wait_stream(lane.stream)

    def _meet(self, lane: _Lane, flag: int) -> None:
        self.barriers += 1
        self._memory.barrier(lane.index, flag, lane.stream)

    def _stream(self) -> torch.cuda.Stream | None:
        return torch.cuda.Stream(self._device, priority=-1) if self._concurrent else None

    def _computation(self) -> torch.cuda.Stream | None:
        return torch.cuda.current_stream(self._device) if self._concurrent else None


def _is_of(fetched: _Fetched, visit: Visit, index: int) -> bool:
    return (
        fetched.visit.weight is visit.weight
        and fetched.visit.cells is visit.cells
        and fetched.index == index
        and fetched.versions == versions_of(visit.weight)
    )


def _mean(
    cell: Cell, parts: Parts, landing: Landing, gradient: torch.Tensor, sums: torch.dtype
) -> None:
    if cell.is_empty:
        return
    out = cell.own_part(gradient)
    if len(landing.parts) == 2 and parts.own.dtype == sums == gradient.dtype:
        torch.lerp(parts.own, landing.other, 0.5, out=out)  # in one pass, without a copy
        return
    landing.own.copy_(parts.own)
    if sums == gradient.dtype:
        torch.mean(landing.parts, 0, dtype=sums, out=out)
    else:
        out.copy_(torch.mean(landing.parts, 0, dtype=sums))
