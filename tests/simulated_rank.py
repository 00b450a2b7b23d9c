"""A rank whose layers do nothing but look at tiles, on a simulated machine.

Rotations are those of ``ops.pull``, with the real transport. A layer's products are operations that
compare every element of their tiles with what the weight is at that moment; its parts of gradients
are numbers of which the mean is known.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import torch
from torch.distributed.tensor import Shard

from rtp_wrap.gradient import SITES_BETWEEN
from rtp_wrap.ops import pull
from rtp_wrap.policy import MixedPrecisionPolicy
from rtp_wrap.ring import Ring
from rtp_wrap.shard import Tile, TileGrid
from rtp_wrap.transport.peer import PeerTransport
from tests.simulated import Graph, Machine, Memory, Stream

#: What a write adds to a weight: more than its elements differ by, and all weights' together.
_WRITTEN = 10_000
#: Divisible by all numbers of ranks, so that means are whole numbers, and exact.
_PART = 12

Order = Sequence[str]
#: Enqueues a look at a gradient.
Check = Callable[[], None]


class Raised(Exception):
    """As a layer may raise in its products, on all ranks at the same place."""


@dataclass(frozen=True)
class World:
    """Ranks and weights: their shapes, by name, and those of which rows are read."""

    world_size: int
    staging_bytes: int
    shapes: Mapping[str, tuple[int, int]]
    reads: Collection[str] = ()
    #: Those that are sharded along their columns.
    columns: Collection[str] = ()
    overlap: bool = True

    def mistakes(self, program: Callable[[Rank], object]) -> list[str]:
        """What is wrong if every rank executes ``program``."""
        machine = Machine(self.world_size)
        staging = [
            machine.allocate(torch.zeros(self.staging_bytes, dtype=torch.uint8))
            for _ in range(self.world_size)
        ]

        def gradient(peers: PeerTransport, home: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
            return machine.allocate(torch.zeros_like(home, dtype=dtype))

        with machine.recording(), patch.object(PeerTransport, "gradient", gradient):
            for rank in range(self.world_size):
                machine.rank = rank
                program(Rank(self, machine, Memory(machine, rank, staging)))
        return machine.mistakes()


class _Weight:
    """As much of a DTensor as the transport asks for."""

    dtype = torch.float32

    def __init__(self, name: str, world: World, machine: Machine, rank: int) -> None:
        self.name, shape = name, world.shapes[name]
        self.shape = torch.Size(shape)
        dim = 1 if name in world.columns else 0
        self.placements = (Shard(dim),)
        first = 1000 * list(world.shapes).index(name)
        self._whole = first + torch.arange(self.shape.numel(), dtype=self.dtype).view(shape)
        shard = TileGrid(shape, dim, world.world_size, 1).shard(rank)
        home = self._whole[shard.rows, shard.cols].clone(memory_format=torch.contiguous_format)
        self._local_tensor = machine.allocate(home)
        self._version = 0
        #: How often it was, as of the operation that runs.
        self.times_written = 0

    def detach(self) -> _Weight:
        return self

    def write(self) -> None:
        self.times_written += 1
        self._local_tensor.add_(_WRITTEN)

    def is_now(self, tile: Tile, values: torch.Tensor) -> bool:
        expected = self._whole[tile.rows, tile.cols] + _WRITTEN * self.times_written
        return torch.equal(values, expected)


class _Ring(Ring):
    """A ring without a process group: events go nowhere."""

    def __init__(self, peers: PeerTransport) -> None:
        self.peers, self.device = peers, torch.device("cuda", 0)
        self.precision = MixedPrecisionPolicy()
        self.lockstep: Any = SimpleNamespace(record=lambda *event: None, verify=lambda when: None)
        self._interrupted, self._stream, self._forward = False, None, threading.Lock()


class Rank:
    """Executes passes on the current stream."""

    def __init__(self, world: World, machine: Machine, memory: Memory) -> None:
        self._world, self._machine, self._rank = world, machine, memory.rank
        #: Two streams for the computation, of which the first one is current.
        self.streams = Stream(machine), Stream(machine)
        machine.current = self.streams[0]
        self.peers = PeerTransport(
            memory,
            world.staging_bytes,
            torch.device("cuda", 0),
            lambda occasion: None,
            overlap=world.overlap,
        )
        self._ring = _Ring(self.peers)
        weights = [_Weight(name, world, machine, self._rank) for name in world.shapes]
        self._weights: dict[str, Any] = {each.name: each for each in weights}
        self._backwards = self._parts = 0

    def use(self, stream: Stream, *, waiting: bool = False) -> None:
        """Go on there, perhaps after what is on the current stream."""
        if waiting:
            stream.wait_stream(self.current)
        self._machine.current = stream

    @property
    def current(self) -> Stream:
        assert self._machine.current is not None
        return self._machine.current

    def forward(
        self, order: Order, *, raising: int | None = None, written: int | None = None
    ) -> None:
        """An outermost one; a layer may raise, or be written before it is called."""
        self._ring.begin_forward("")
        try:
            for place, name in enumerate(order):
                if place == written:
                    self.write(name)
                self._call(name, raising=place == raising)
        finally:
            self._ring.end_forward(raised=False)

    def backward(
        self,
        order: Order,
        *,
        raising: int | None = None,
        ending: int | None = None,
        recomputed: Collection[int] = (),
        nested: Collection[int] = (),
    ) -> None:
        """That of a forward in ``order``; some layers are called again before theirs.

        Some of which in a backward of their own, as reentrant checkpoints have it. A layer may
        raise, or something else that comes before a layer.
        """
        with self._graph_task() as checks:
            for place, name in reversed(list(enumerate(order))):
                if place == ending:
                    raise Raised
                if place in recomputed:
                    self._call(name)
                needs_dx = place > 0 and name not in self._world.reads
                with self._graph_task() if place in nested else nullcontext():
                    checks.append(self._derive(name, needs_dx, raising=place == raising))
                if len(checks) > SITES_BETWEEN:
                    checks.pop(0)()

    @contextmanager
    def _graph_task(self) -> Iterator[list[Check]]:
        """A backward as autograd runs it; unless it raised, it ends with calling back.

        Before that it runs what is left of its ``Check``s: they are the weights' nodes.
        """
        machine = self._machine
        around = machine.backward, machine.callbacks
        self._backwards += 1
        machine.backward, machine.callbacks = self._backwards, []
        checks: list[Check] = []
        try:
            yield checks
            for check in checks:
                check()
            for call_back in machine.callbacks:
                call_back()
        finally:
            machine.backward, machine.callbacks = around

    def write(self, *names: str) -> None:
        """As an optimizer's step does; to all weights if there are no names."""
        for name in names or self._weights:
            weight = self._weights[name]
            weight._version += 1
            home = [weight._local_tensor]
            self._machine.enqueue(None, f"write {name}", writes=home, run=weight.write)

    def train(self, order: Order) -> None:
        self.forward(order)
        self.backward(order)
        self.write()

    def captured(self, call: Callable[[Order], None], order: Order) -> Graph:
        with self._machine.capturing() as graph:
            call(order)
        return graph

    def replay(self, graph: Graph) -> None:
        self._machine.replay(graph)

    def _call(self, name: str, *, raising: bool = False) -> None:
        weight, event = self._weights[name], f"{name} forward"

        def product(tile: Tile, values: torch.Tensor) -> None:
            self._look(f"product {name}", weight, tile, values)
            if raising:
                raise Raised

        def read(tiles: Any) -> None:
            for tile, values in tiles:
                product(tile, values)

        if name in self._world.reads:
            pull.read(self._ring, event, weight, weight.dtype, read)
        else:
            pull.forward(self._ring, event, weight, weight.dtype, product)

    def _derive(self, name: str, needs_dx: bool, *, raising: bool) -> Check:
        """The backward of a layer; returns what waits for its gradient, and compares that."""
        weight, machine = self._weights[name], self._machine
        self._parts += 1
        part = self._parts

        def value(scale: float) -> float:
            return _PART * scale * (part + weight.times_written)

        def dgrad(tile: Tile, values: torch.Tensor) -> None:
            self._look(f"dgrad {name}", weight, tile, values)

        def wgrad(tile: Tile, start: None, out: torch.Tensor, scale: float) -> None:
            if raising:
                raise Raised

            def write() -> None:
                out.fill_(value(1 + self._rank))

            machine.enqueue(None, f"wgrad {name}", writes=[out], run=write)

        event = f"{name} backward {needs_dx}"
        gradient = pull.backward(
            self._ring, event, weight, weight.dtype, dgrad if needs_dx else None, wgrad
        )
        assert gradient is not None

        def is_mean() -> bool:
            mean = value((1 + self._world.world_size) / 2)
            return bool(gradient.eq(mean).all())

        ready = self.peers.averaged()

        def check() -> None:
            if ready is not None:
                ready.wait(cast(Any, self.current))
            machine.enqueue(None, f"gradient {name}", reads=[gradient], run=is_mean)

        return check

    def _look(self, what: str, weight: _Weight, tile: Tile, values: torch.Tensor) -> None:
        is_now = partial(weight.is_now, tile, values)
        self._machine.enqueue(None, what, reads=[values], run=is_now)
