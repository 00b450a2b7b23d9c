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

Each of the two has a *lane*: a stream, two slots used in turn, and barriers of its own. Barriers
are all the synchronisation there is between ranks. Barrier k tells that every rank has published
cell k, and, as a lane's work is in order, that it has pulled cell k - 1: so the slot of cell k - 1
may be written again, for cell k + 1.

On a GPU the lanes have nothing but barriers and pulls, which take no multiprocessor. Copies within
a GPU do: a large GEMM leaves none free until it ends, and would hold up a lane with such a copy. So
a cell is published by the computation's own stream, one cell ahead of its use, and averages, which
nothing waits for but who takes the gradient, have a stream of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rtp_wrap.transport.cells import Cell, PeerMemory, Tiles, cells_of, cut
from rtp_wrap.transport.foresight import Foresight, Visit
from rtp_wrap.versions import versions_of

_WEIGHTS, _GRADIENTS = 0, 1
#: The flag of barriers that are none of a cell's; theirs are 0 and 1, as their slots.
_FENCE = 2


@dataclass(frozen=True, slots=True)
class _Fetched:
    """A cell that is there, or on its way."""

    visit: Visit
    index: int
    versions: tuple[int, int]
    parity: int


class _Lane:
    """What is done in order, cell by cell, beside the computation: on a stream if there is one."""

    def __init__(self, stream: torch.cuda.Stream | None) -> None:
        self.stream = stream
        self.count = 0
        #: Whether the last cell is part of a graph.
        self.captured = False
        self.forget()

    def forget(self) -> None:
        """The events of before belong to another graph, or to none. Of each slot: ..."""
        #: The computation has put something there.
        self.given = [_event(self.stream), _event(self.stream)]
        #: All ranks have met at this slot's barrier.
        self.met = [_event(self.stream), _event(self.stream)]
        #: What was to be pulled has come.
        self.come = [_event(self.stream), _event(self.stream)]


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
        self._lanes = [_Lane(self._stream()) for _ in (_WEIGHTS, _GRADIENTS)]
        #: Where gradients are finished, if not on the stream of the computation.
        self.gradient_stream = self._stream()
        self._averaged = [_event(self.gradient_stream), _event(self.gradient_stream)]
        self._cells: dict[tuple[torch.Size, int, torch.dtype], list[Cell]] = {}
        self._foresight = Foresight()
        self._ahead: _Fetched | None = None
        #: How many there were.
        self.barriers = 0

    def cells(self, shape: torch.Size, dim: int, dtype: torch.dtype) -> list[Cell]:
        """A weight of ``shape``, sharded along ``dim``, as tiles of ``dtype``."""
        key = shape, dim, dtype
        cells = self._cells.get(key)
        if cells is None:
            grid = cut(tuple(shape), dim, self._memory.world_size, dtype, self._staging_bytes)
            # Views made under inference_mode could not be written to outside it.
            with torch.inference_mode(False):
                cells = cells_of(self._memory, grid, dtype, self._staging_bytes)
            self._cells[key] = cells
        return cells

    def begin_forward(self) -> None:
        """An outermost forward begins."""
        self._foresight.begin()

    def pull(self, visit: Visit, index: int) -> Tiles:
        """The tiles of a cell, valid until the next call; the cell after it is fetched as well."""
        now, self._ahead = self._ahead, None
        if now is None or self._foresight.begun or not _is_of(now, visit, index):
            now = self._fetch(visit, index)
        if index == 0:
            self._foresight.visit(visit)
        if self._overlap:
            if index + 1 < len(visit.cells):
                self._ahead = self._fetch(visit, index + 1)
            elif (upcoming := self._foresight.upcoming) is not None:
                self._ahead = self._fetch(upcoming, 0)
        _wait(self._computation(), self._lanes[_WEIGHTS].come[now.parity])
        return visit.cells[index].tiles[now.parity]

    def _fetch(self, visit: Visit, index: int) -> _Fetched:
        """Publish this rank's tile of a cell, and pull those of the others."""
        lane, cell, computation = self._lanes[_WEIGHTS], visit.cells[index], self._computation()
        self._follow_capture(_WEIGHTS)
        parity = lane.count & 1
        lane.count += 1
        # All ranks have pulled what was in this slot before.
        _wait(computation, lane.met[1 - parity])
        if not cell.is_empty:
            cell.published[parity].copy_(cell.own_part(visit.weight._local_tensor))
        _record(lane.given[parity], computation)
        _enter(lane.stream)
        try:
            # The computation is done with the tiles in this slot, too: it published after that.
            _wait(lane.stream, lane.given[parity])
            self._meet(_WEIGHTS, parity)
            _record(lane.met[parity], lane.stream)
            for to, source in cell.pulls[parity]:
                to.copy_(source)
            _record(lane.come[parity], lane.stream)
        finally:
            _enter(computation)
        return _Fetched(visit, index, versions_of(visit.weight), parity)

    def gradient(self, home: torch.Tensor) -> torch.Tensor:
        """Memory for the gradient of a home shard, to be finished on ``gradient_stream``."""
        gradient = torch.empty_like(home, memory_format=torch.contiguous_format)
        if self.gradient_stream is not None:
            # The memory is the computation's, as activations leave it room in backward. Autograd
            # may drop it, having added it to another, before that stream is done with it.
            gradient.record_stream(self.gradient_stream)
        return gradient

    def parts(self, cell: Cell) -> Tiles:
        """Where the computation is to write its part of the gradient of a cell's tiles."""
        lane, computation = self._lanes[_GRADIENTS], self._computation()
        self._follow_capture(_GRADIENTS)
        parity = lane.count & 1
        # The others have pulled what was there before, and this rank has averaged its own.
        _wait(computation, lane.met[1 - parity])
        _wait(computation, self._averaged[parity])
        return cell.parts[parity]

    def average(self, cell: Cell, gradient: torch.Tensor, sums: torch.dtype) -> None:
        """Put the mean of all ranks' parts into the home shard's ``gradient``; sum in ``sums``."""
        lane, computation = self._lanes[_GRADIENTS], self._computation()
        parity = lane.count & 1
        lane.count += 1
        _record(lane.given[parity], computation)
        try:
            _enter(lane.stream)
            _wait(lane.stream, lane.given[parity])
            self._meet(_GRADIENTS, parity)
            _record(lane.met[parity], lane.stream)
            _wait(lane.stream, self._averaged[1 - parity])  # there is one landing
            for to, source in cell.part_pulls[parity]:
                to.copy_(source)
            _record(lane.come[parity], lane.stream)
            _enter(self.gradient_stream)
            _wait(self.gradient_stream, lane.come[parity])
            if not cell.is_empty:
                cell.own_landing.copy_(cell.own_parts[parity])
                out = cell.own_part(gradient)
                if sums == gradient.dtype:
                    torch.mean(cell.landing, 0, dtype=sums, out=out)
                else:
                    out.copy_(torch.mean(cell.landing, 0, dtype=sums))
            _record(self._averaged[parity], self.gradient_stream)
        finally:
            _enter(computation)

    def settle(self) -> None:
        """After an exception: what is still under way comes before anything else."""
        self._foresight.begin()
        self._ahead = None
        computation = self._computation()
        if computation is not None:
            for stream in (*(lane.stream for lane in self._lanes), self.gradient_stream):
                if stream is not None:
                    computation.wait_stream(stream)

    def _follow_capture(self, index: int) -> None:
        """Before each cell: begin anew inside a graph that is being captured, and after it.

        A captured graph cannot wait for events of outside it. And it repeats its cells from the
        same slot on, whichever the last one was: so it begins with a barrier of another flag.
        """
        lane, computation = self._lanes[index], self._computation()
        if lane.stream is None or computation is None:
            return
        capturing = torch.cuda.is_current_stream_capturing()
        if capturing == lane.captured:
            return
        lane.captured = capturing
        lane.forget()
        if index == _GRADIENTS:
            self._averaged = [_event(self.gradient_stream), _event(self.gradient_stream)]
        lane.stream.wait_stream(computation)
        _enter(lane.stream)
        try:
            self._meet(index, _FENCE)
        finally:
            _enter(computation)
        computation.wait_stream(lane.stream)

    def _meet(self, lane: int, flag: int) -> None:
        self.barriers += 1
        self._memory.barrier(lane, flag)

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


def _event(stream: torch.cuda.Stream | None) -> torch.cuda.Event | None:
    return None if stream is None else torch.cuda.Event()


def _enter(stream: torch.cuda.Stream | None) -> None:
    """What is enqueued from now on is on ``stream``; a context manager takes longer."""
    if stream is not None:
        torch.cuda.set_stream(stream)


def _record(event: torch.cuda.Event | None, stream: torch.cuda.Stream | None) -> None:
    if event is not None:
        event.record(stream)


def _wait(stream: torch.cuda.Stream | None, event: torch.cuda.Event | None) -> None:
    if stream is not None and event is not None:
        stream.wait_event(event)
