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
cell k - 1: so others may lie there from cell k + 1 on. Small cells that are expected one after the
other are published and pulled together: for barriers and places they are one.

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
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from rtp_wrap.engine import at_its_end, running_backward, unseen_by_checkpoints
from rtp_wrap.shard import sharded_dim
from rtp_wrap.transport.area import Area
from rtp_wrap.transport.cells import (
    Cell,
    Parts,
    PeerMemory,
    Published,
    Tiles,
    cells_of,
    cut,
    published_cells,
    slots,
)
from rtp_wrap.transport.fetched import Expected, Fetched
from rtp_wrap.transport.foresight import Foresight, Visit, Visited
from rtp_wrap.transport.lane import Events, Lane
from rtp_wrap.transport.mean import put_mean

#: So many cells are fetched together, if they are small. More would only be fetched in vain where
#: something else comes than was expected.
_TOGETHER = 4


class PeerTransport:
    """Publishes, pulls and averages, in ``staging_bytes`` of ``memory``.

    ``overlap=False`` does all of it on the stream of the computation. ``agree`` is called with what
    all ranks must have seen, and raises where one of them has not.
    """

    def __init__(
        self,
        memory: PeerMemory,
        staging_bytes: int,
        device: torch.device,
        agree: Callable[[str], object],
        *,
        overlap: bool,
    ) -> None:
        self._memory = memory
        self._agree = agree
        self._device = device
        self._overlap = overlap
        self._concurrent = overlap and device.type == "cuda"
        self._slots = slots(overlap=overlap)
        self._room = room = self._slots.largest_cell(staging_bytes)
        weights, parts, landing = self._slots
        self._weights = Lane(memory, 0, self._stream(), Area(0, room, weights))
        self._gradients = Lane(memory, 1, self._stream(), Area(weights * room, room, parts))
        self._landings = Area((weights + parts) * room, room, landing)
        #: Where gradients are averaged, if not on the stream of the computation.
        self.gradient_stream = self._stream()
        if self._concurrent:
            self._averaged = Events()
        #: The stream of the running site, on a GPU.
        self._computation: torch.cuda.Stream | None = None
        #: The graph that is being captured; 0 for none.
        self._capture = 0
        #: Whether there is one, which may be replayed after every pass.
        self._has_graph = False
        #: Lanes begin anew with each: a capture, where there are graphs a pass outside of them, and
        #: what comes after an exception.
        self._epoch = 0
        #: The backward whose end is waited for; -1 for none.
        self._backward = -1
        self._cells: dict[tuple[torch.Size, int, torch.dtype, bool], list[Cell]] = {}
        starts = [memory.of(owner).data_ptr() for owner in range(memory.world_size)]
        self._addresses = torch.tensor(starts, dtype=torch.int64, device=device)
        self._foresight = Foresight()
        self._ahead: deque[Fetched] = deque()
        #: The exchange that brought the tiles in use.
        self._in_use = -1
        #: How many there were.
        self.barriers = 0

    def visit(
        self, event: str, weight: DTensor, dtype: torch.dtype, *, reads: bool = False
    ) -> Visit:
        """A site in one direction of the pass, which ``event`` names, with tiles of ``dtype``.

        If it ``reads``, the weight is sharded along its rows.
        """
        visited, way = Visited.of(weight), (event, dtype, reads)
        visit = visited.visits.get(way)
        if visit is None:
            cells = self._cells_of(weight.shape, sharded_dim(weight), dtype, reads)
            visited.visits[way] = visit = Visit(event, visited, cells, reads)
        return visit

    def _cells_of(self, shape: torch.Size, dim: int, dtype: torch.dtype, reads: bool) -> list[Cell]:
        key = shape, dim, dtype, reads
        cells = self._cells.get(key)
        if cells is None:
            memory, room = self._memory, self._room
            if reads:
                cells = published_cells(memory, self._addresses, tuple(shape), dtype, room)
            else:
                grid = cut(tuple(shape), dim, memory.world_size, dtype, room)
                cells = cells_of(memory, grid, dtype)
            self._cells[key] = cells
        return cells

    def begin_forward(self) -> None:
        """An outermost forward begins, or goes on where weights may have been written unseen."""
        self._foresight.begin()

    def begin(self, computation: torch.cuda.Stream, capturing: bool) -> None:
        """A site begins on the stream ``computation`` of a GPU; it may be captured in a graph."""
        self._computation = computation
        capture = self._memory.capture(computation) if capturing else 0
        if capture != self._capture:
            self._capture, self._has_graph = capture, True
            self._begin_epoch()
        if self._has_graph:
            backward = running_backward()
            if backward != self._backward:
                if self._backward != -1:  # it raised, and so did not call back
                    self.end_pass()
                self._backward = backward
                if backward != -1:
                    at_its_end(self.end_pass)

    def end_pass(self) -> None:
        """An outermost forward, or a backward, is over.

        What comes next may be the replay of a graph, or the end of a capture. Neither sees what is
        under way beside the computation. So all of that is waited for, and nothing is kept that a
        replay could write to.
        """
        self._backward = -1
        if self._has_graph:
            self._join(torch.cuda.current_stream(self._device))
            if not self._capture:
                self._begin_epoch()

    def _begin_epoch(self) -> None:
        self._epoch += 1
        self._ahead.clear()
        self._foresight.begin()

    def pull(self, visit: Visit, index: int) -> Tiles:
        """The tiles of a cell, valid until the next call; those after it are fetched as well."""
        begun = self._come_to(visit, index)
        is_there = not begun and bool(self._ahead) and self._ahead[0].is_of(visit, index)
        if is_there and self._ahead[0].is_outdated:
            # If one rank alone fetched again, its barriers would meet others' next ones.
            self._agree(f"{visit.event}, whose weight was written since it was fetched ahead")
            is_there = False
        if not is_there:
            self._drop()
            self._fetch([self._expected(visit, index)])
        now = self._ahead.popleft()
        if now.number != self._in_use:
            self._use(now)
            self._look_ahead(now)
        return now.tiles

    def read(self, visit: Visit, index: int, read: Callable[[Published], None]) -> None:
        """Have ``read`` take what it needs of the tiles of a cell, out of their owners' memories.

        It is called once, and reads on the stream of the computation. ``visit.reads``, so that its
        cells are ``published`` ones.
        """
        self._come_to(visit, index)
        self._drop()
        self._fetch([self._expected(visit, index)])
        now = self._ahead.popleft()
        self._use(now)
        assert isinstance(now.tiles, Published)
        read(now.tiles)
        if index + 1 == len(visit.cells):
            self._look_ahead(now)

    def _expected(self, visit: Visit, index: int) -> Expected:
        """What has come."""
        weight = visit.weight
        assert weight is not None
        return Expected(visit, weight, index, self._foresight.context)

    def _come_to(self, visit: Visit, index: int) -> bool:
        """This cell is next; whether it is the first since a forward began."""
        begun = self._foresight.begun
        if begun:
            for area in (self._weights.area, self._gradients.area, self._landings):
                area.rewind()
        if index == 0:
            self._foresight.visit(visit)
        return begun

    def _use(self, now: Fetched) -> None:
        """The computation goes on with what an exchange brought, and is done with what was before.

        So another one can be fetched.
        """
        self._in_use = now.number
        if now.come is not None and self._computation is not None:
            now.come.wait(self._computation)

    def _look_ahead(self, now: Fetched) -> None:
        """Fetch what is expected behind ``now``, an exchange for every slot but the one in use."""
        while self._overlap and self._weights.number < now.number + self._slots.weights - 1:
            upcoming = self._upcoming((self._ahead[-1] if self._ahead else now).what)
            if not upcoming:
                break
            self._fetch(upcoming)

    def _drop(self) -> None:
        """Something else comes than what was fetched, whose place is free as soon as it is there.

        That the computation waits for it is what ``_fetch`` relies on.
        """
        if self._ahead:
            come = self._ahead[-1].come
            if come is not None and self._computation is not None:
                come.wait(self._computation)
            self._ahead.clear()

    def _upcoming(self, last: Expected) -> list[Expected]:
        """What is expected after ``last``: as many cells as fit a slot together."""
        upcoming: list[Expected] = []
        nbytes = 0
        while len(upcoming) < _TOGETHER:
            if last.position + 1 < len(last.visit.cells):
                last = last._replace(position=last.position + 1)
            else:
                visit = self._foresight.after(last.context)
                if visit is None or visit.reads or (weight := visit.weight) is None:
                    break
                last = Expected(visit, weight, 0, (last.context[1], visit))
            nbytes += last.cell.nbytes
            if nbytes > self._room:
                break
            upcoming.append(last)
        return upcoming

    def _fetch(self, cells: Sequence[Expected]) -> None:
        """Publish this rank's tiles of cells, and pull those of the others, in one exchange.

        With overlap they take the place of exchanges before the last but one. The computation has
        waited for that one to come (see ``pull``), so that all ranks had pulled by then what lay
        here. Without, it has waited for the last one, and they take the place of those before it.
        """
        lane = self._weights
        number = self._next(lane)
        at, before = lane.area.take(sum(each.cell.nbytes for each in cells), number)
        assert before < number - self._slots.weights + 1
        placed = []
        with unseen_by_checkpoints():  # a recomputation may have fetched others ahead
            for each in cells:
                cell = each.cell
                weights = cell.weights(at)
                at += cell.nbytes
                if not cell.is_empty:
                    weights.published.copy_(cell.own_part(each.weight.home))
                placed.append((each, weights))
            come = self._exchange(lane, [weights.pulls for _, weights in placed])
        for each, weights in placed:
            versions = each.weight.versions
            self._ahead.append(Fetched(each, number, versions, weights.consumed, come))

    def _exchange(
        self, lane: Lane, pulls: Sequence[Any], after: torch.cuda.Event | None = None
    ) -> torch.cuda.Event | None:
        """Meet the others behind what the computation has put there, then pull.

        If pulls are to come ``after`` something, there is an event of the meeting, too. Returns
        that of the last pull, or ``None`` if all this happens on the computation's stream.
        """
        number, stream = lane.number, lane.stream
        self.barriers += 1
        if stream is None or self._computation is None:
            lane.meet()
            for each in pulls:
                self._memory.copy(each, None)
            return None
        given, come = lane.given.of(number), lane.come.of(number)
        given.record(self._computation)
        given.wait(stream)
        lane.meet()
        if after is not None:
            lane.met.of(number).record(stream)
            after.wait(stream)
        for each in pulls:
            self._memory.copy(each, stream)
        come.record(stream)
        return come

    def gradient(self, home: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Memory for the gradient of a home shard, which ``average`` writes to."""
        gradient = torch.empty_like(home, dtype=dtype, memory_format=torch.contiguous_format)
        if self.gradient_stream is not None:
            # The memory is the computation's, as activations leave it room in backward. It may be
            # dropped before that stream is done with it: nobody takes the gradient, or one raises.
            gradient.record_stream(self.gradient_stream)
        return gradient

    def parts(self, cell: Cell) -> Parts:
        """Where the computation is to write its part of the gradient of a cell's tiles."""
        lane, computation = self._gradients, self._computation
        number = self._next(lane)
        at, before = lane.area.take(cell.nbytes, number)
        assert before + 1 < number
        if computation is not None and lane.stream is not None:
            # All others have pulled what lies there, and this rank's own part is averaged.
            lane.met.of(before + 1).wait(computation)
            self._averaged.of(before).wait(computation)
        return cell.parts(at)

    def average(self, cell: Cell, parts: Parts, gradient: torch.Tensor, sums: torch.dtype) -> None:
        """Put the mean of all ranks' parts into the home shard's ``gradient``; sum in ``sums``."""
        lane, finish = self._gradients, self.gradient_stream
        number = lane.number
        at, before = self._landings.take(cell.landing_nbytes, number)
        landing = cell.landing(at, parts.at)
        after = self._averaged.of(before) if self._concurrent else None
        come = self._exchange(lane, [landing.pulls], after)
        if come is not None and finish is not None:
            come.wait(finish)
        if not cell.is_empty:
            mean = cell.own_part(gradient)
            put_mean(parts.own, landing, self._memory.rank, mean, sums, finish)
        if finish is not None:
            self._averaged.of(number).record(finish)

    def averaged(self) -> torch.cuda.Event | None:
        """When all averages so far are done; ``None`` where the computation makes them itself."""
        return self._averaged.of(self._gradients.number) if self._concurrent else None

    def settle(self) -> None:
        """After an exception: what is still under way comes before anything else.

        Ranks can have raised at different places of the same cell, so that parts have a place on
        one of them and none on another. So lanes begin anew.
        """
        if self._computation is not None:
            self._join(self._computation)
        self._begin_epoch()

    def _join(self, stream: torch.cuda.Stream) -> None:
        """``stream`` waits for all that lanes do, of this epoch: a graph knows of no other."""
        for lane in (self._weights, self._gradients):
            if lane.stream is not None and lane.epoch == self._epoch:
                stream.wait_stream(lane.stream)
        if self.gradient_stream is not None and self._gradients.epoch == self._epoch:
            stream.wait_stream(self.gradient_stream)

    def _next(self, lane: Lane) -> int:
        """The number of a new exchange."""
        if lane.epoch != self._epoch:
            self._begin_anew(lane)
        lane.number += 1
        return lane.number

    def _begin_anew(self, lane: Lane) -> None:
        """Begin inside a graph that is being captured, where one may have been replayed, or anew.

        A captured graph cannot wait for events of outside it. And it repeats its cells in the same
        places and with the same flags, whichever came last. So there is a fence, a barrier after
        which all ranks are done with all that came before.
        """
        lane.epoch = self._epoch
        lane.forget()
        if lane is self._gradients:
            self._landings.forget()
            if self._concurrent:
                self._averaged = Events()
        self.barriers += 1
        if lane.stream is not None and self._computation is not None:
            lane.stream.wait_stream(self._computation)
        lane.fence(in_graph=self._capture != 0)
        if lane.stream is not None and self._computation is not None:
            self._computation.wait_stream(lane.stream)

    def _stream(self) -> torch.cuda.Stream | None:
        return torch.cuda.Stream(self._device, priority=-1) if self._concurrent else None
