"""Streams, events, graphs and memory of several ranks in one process, where nothing is run.

Calls are recorded as operations, for ``happens_before``. The ranks' programs are executed one after
the other: no host ever waits for another one. ``Machine.recording`` puts all this in the place of
CUDA's for the peer transport.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rtp_wrap import ring
from rtp_wrap.transport import lane, mean, peer
from rtp_wrap.transport.cells import Copies
from tests.happens_before import Access, Barrier, Operation, mistakes_of


class Stream:
    """Of the rank whose program is executed when it is made."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        #: What the next operation comes after.
        self.frontier: tuple[int, ...] = ()
        machine.streams[machine.rank].append(self)

    def wait_stream(self, other: Stream) -> None:
        event = Event(self._machine)
        event.record(other)
        event.wait(self)


class Event:
    """Remembers what was on a stream."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.graph: Graph | None = None
        self.frontier: tuple[int, ...] | None = None

    def record(self, stream: Stream) -> None:
        self.graph, self.frontier = self._machine.graph, self._machine.frontier(stream)

    def wait(self, stream: Stream) -> None:
        if self.frontier is not None:
            self._machine.wait(stream, self)


class Graph:
    """What was recorded instead of being done, and how far it is on streams that take part."""

    def __init__(self, number: int, origin: Stream) -> None:
        self.number, self.origin = number, origin
        self.operations: list[Operation] = []
        self.frontiers: dict[Stream, tuple[int, ...]] = {origin: ()}

    def unjoined(self) -> set[str]:
        """What the origin has not waited for."""
        joined: set[int] = set()
        waiting = list(self.frontiers[self.origin])
        while waiting:
            at = waiting.pop()
            if at not in joined:
                joined.add(at)
                waiting += self.operations[at].after
        return {each.what for at, each in enumerate(self.operations) if at not in joined}


class Machine:
    """All ranks' operations, and the state of the host whose program is executed."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.streams: list[list[Stream]] = [[] for _ in range(world_size)]
        self.operations: list[Operation] = []
        self.rank = 0
        self.current: Stream | None = None
        self.graph: Graph | None = None
        #: The number of the backward that runs, or -1, and what is to be called at its end.
        self.backward = -1
        self.callbacks: list[Callable[[], None]] = []
        self._graphs = 0
        self._mistakes: list[str] = []
        self._memory: dict[int, torch.Tensor] = {}

    def mistakes(self) -> list[str]:
        return self._mistakes or mistakes_of(self.operations, self.world_size)

    def allocate(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` is memory whose accesses count, from now on and for good."""
        self._memory[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def is_ours(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._memory

    def enqueue(
        self,
        stream: Stream | None,
        what: str,
        *,
        reads: Sequence[torch.Tensor] = (),
        writes: Sequence[torch.Tensor] = (),
        run: Callable[[], object] | None = None,
        barrier: Barrier | None = None,
    ) -> None:
        """An operation on ``stream``, ``None`` for the current one."""
        stream = stream or self.current
        assert stream is not None
        pairs = [*((each, False) for each in reads), *((each, True) for each in writes)]
        accesses = tuple(_access(each, wrote) for each, wrote in pairs if each.numel())
        operations = self.operations if self.graph is None else self.graph.operations
        after = self.frontier(stream)
        operations.append(Operation(what, self.rank, after, accesses, run, barrier))
        self._advance(stream, (len(operations) - 1,))

    def frontier(self, stream: Stream) -> tuple[int, ...]:
        if self.graph is None:
            return stream.frontier
        if stream not in self.graph.frontiers:
            self._mistakes.append("a stream is used that is not captured")
        return self.graph.frontiers.get(stream, ())

    def wait(self, stream: Stream, event: Event) -> None:
        if event.graph is not self.graph:
            self._mistakes.append("an event is waited for that is of another graph, or of none")
            return
        before = stream.frontier if self.graph is None else self.graph.frontiers.get(stream, ())
        self._advance(stream, tuple({*before, *(event.frontier or ())}))

    def _advance(self, stream: Stream, frontier: tuple[int, ...]) -> None:
        if self.graph is None:
            stream.frontier = frontier
        else:
            self.graph.frontiers[stream] = frontier

    @contextmanager
    def capturing(self) -> Iterator[Graph]:
        """As ``torch.cuda.graph``, which synchronises before and has a stream of its own."""
        done = {at for stream in self.streams[self.rank] for at in stream.frontier}
        for stream in self.streams[self.rank]:
            stream.frontier = tuple(done)
        self._graphs += 1
        before, self.current = self.current, Stream(self)
        self.graph = graph = Graph(self._graphs, self.current)
        yield graph
        unjoined = graph.unjoined()
        if unjoined:
            self._mistakes.append(f"a capture ends without having waited for {unjoined}")
        self.graph, self.current = None, before

    def replay(self, graph: Graph) -> None:
        """On the current stream."""
        assert self.current is not None
        self.enqueue(None, "a replay begins")
        first = len(self.operations)
        for each in graph.operations:
            after = tuple(at + first for at in each.after) or (first - 1,)
            what = f"{each.what} (replayed)"
            self.operations.append(
                Operation(what, each.rank, after, each.accesses, each.run, each.barrier)
            )
        self._advance(self.current, tuple(range(first - 1, len(self.operations))))
        self.enqueue(None, "a replay ends")

    def _at_its_end(self, call: Callable[[], None]) -> None:
        self.callbacks.append(call)

    @contextmanager
    def using(self, stream: Stream) -> Iterator[None]:
        """``stream`` is the current one."""
        before, self.current = self.current, stream
        yield
        self.current = before

    @contextmanager
    def recording(self) -> Iterator[None]:
        """The peer transport takes this machine for CUDA."""
        fake = _Torch(self)
        with ExitStack() as stack:
            for module in (peer, lane, ring, mean):
                stack.enter_context(patch.object(module, "torch", fake))
            current = stack.enter_context(patch.object(ring, "current_stream"))
            current.side_effect = lambda device: self.current
            running = stack.enter_context(patch.object(peer, "running_backward"))
            running.side_effect = lambda: self.backward
            stack.enter_context(patch.object(peer, "at_its_end", self._at_its_end))
            stack.enter_context(_Recorder(self))
            yield


class Memory:
    """A ``PeerMemory``."""

    def __init__(self, machine: Machine, rank: int, staging: list[torch.Tensor]) -> None:
        self._machine, self._staging = machine, staging
        self.rank, self.world_size = rank, machine.world_size

    def of(self, owner: int) -> torch.Tensor:
        return self._staging[owner]

    def barrier(self, lane: int, flag: int, stream: Any) -> None:
        what = f"barrier of lane {lane}"
        self._machine.enqueue(stream, what)
        self._machine.enqueue(stream, what, barrier=Barrier(lane, flag))

    def capture(self, stream: Any) -> int:
        assert self._machine.graph is not None
        return self._machine.graph.number

    def prepared(self, copies: Copies) -> Copies:
        return copies

    def copy(self, prepared: Copies, stream: Any) -> None:
        for to, source in prepared:
            copy = partial(to.copy_, source)
            self._machine.enqueue(stream, "pull", reads=[source], writes=[to], run=copy)


class _Torch:
    """``torch``, but streams and backwards are the machine's, and tensors are on the CPU."""

    def __init__(self, machine: Machine) -> None:
        self.cuda = SimpleNamespace(
            Stream=lambda device, priority: Stream(machine),
            Event=lambda: Event(machine),
            stream=machine.using,
            current_stream=lambda device: machine.current,
            is_current_stream_capturing=lambda: machine.graph is not None,
        )

    def tensor(self, data: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.tensor(data, dtype=dtype)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


class _Recorder(TorchDispatchMode):
    """What torch would write to the machine's memory is enqueued on the current stream."""

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self._machine = machine

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        written = [args[at] if isinstance(at, int) else kwargs[at] for at in _written(func)]
        ours = [each for each in written if self._machine.is_ours(each)]
        if not ours:
            return func(*args, **kwargs)
        given = [each for each in args if isinstance(each, torch.Tensor)]
        self._machine.enqueue(
            None,
            str(func),
            reads=[each for each in given if self._machine.is_ours(each)],
            writes=ours,
            run=partial(func, *args, **kwargs),
        )
        return ours[0]


@cache
def _written(func: Any) -> list[int | str]:
    """Which arguments an operator writes to: places, or names."""
    return [
        each.name if each.kwarg_only else at
        for at, each in enumerate(func._schema.arguments)
        if each.alias_info is not None and each.alias_info.is_write
    ]


def _access(tensor: torch.Tensor, writes: bool) -> Access:
    start = tensor.data_ptr()
    if tensor.is_contiguous():
        return Access(start, start + tensor.nbytes, writes)
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    reach = sum((size - 1) * step for size, step in sizes)
    return Access(start, start + (reach + 1) * tensor.itemsize, writes)
