"""Whatever peers write and read is in order, by barriers and events alone, in every program.

No ranks and no GPU: the transport runs on streams, graphs and memory that are simulated. What it
records is searched for races, however unlikely, and for barriers that do not hold; then it is run
in one order, in which every product must find the tiles of its weight, and every owner the mean.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rtp_wrap import ring
from rtp_wrap.transport import peer
from rtp_wrap.transport.lane import Lane
from rtp_wrap.transport.peer import PeerTransport
from tests.simulated import Event, Graph, Stream
from tests.simulated_rank import Order, Raised, Rank, World

EQUAL = dict.fromkeys("abcde", (8, 8))
UNEVEN = {"a": (3, 8), "b": (7, 4), "c": (2, 9), "d": (8, 8), "e": (5, 1)}
#: A slot for each of the layers of 256 bytes.
STAGING = 7 * 256
WORLDS = {
    "two ranks": World(2, STAGING, EQUAL),
    "three ranks": World(3, 7 * 288, {name: EQUAL[name] for name in "abcd"}),
    "one layer": World(2, STAGING, {"a": (8, 8)}),
    "cut into cells": World(2, STAGING // 2, dict.fromkeys("abc", (8, 8))),
    "fetched together": World(2, 3 * STAGING, EQUAL),
    "uneven": World(3, 7 * 384, UNEVEN, columns="be"),
    "rows read": World(3, 7 * 288, UNEVEN, reads="ac"),
    "no overlap": World(3, 7 * 288, UNEVEN, reads="a", columns="b", overlap=False),
}


def train(rank: Rank, names: Order) -> None:
    for _ in range(4):
        rank.train(names)
    rank.forward(names)
    rank.forward(names)
    rank.train(names)


def drop(rank: Rank, names: Order) -> None:
    """Something else comes than what was fetched, or a layer is written that was."""
    for order in (names, names, names[::-1], names, names[:1], names[1:] + names[:1], names):
        rank.train(order)
    for written in range(len(names)):
        rank.forward(names, written=written)
    rank.train(names)


def recompute(rank: Rank, names: Order) -> None:
    for _ in range(2):
        rank.forward(names)
        rank.backward(names, recomputed=range(0, len(names), 2))
        rank.write()
    graph = rank.captured(rank.train, names)
    for _ in range(2):
        rank.replay(graph)
        rank.forward(names)
        rank.backward(names, recomputed=range(len(names)), nested=range(0, len(names), 2))
        rank.write()


def repeat(rank: Rank, names: Order) -> None:
    """One layer thrice, which is then not what comes next."""
    for _ in range(3):
        rank.train([names[0]] * 3)
    graph = rank.captured(rank.train, [names[0]] * 3)
    for _ in range(2):
        rank.replay(graph)
        rank.train([names[0]] * 3)


def change_streams(rank: Rank, names: Order) -> None:
    """Between passes and within them, without waiting for the stream before."""
    for turn in range(6):
        rank.use(rank.streams[turn % 2])
        rank.forward(names)
        rank.use(rank.streams[turn // 2 % 2])
        rank.backward(names)
        rank.write()


def interrupt(rank: Rank, names: Order) -> None:
    """By exceptions in forwards, in backwards, and between the layers of those."""
    for at in range(len(names)):
        rank.train(names)
        with suppress(Raised):
            rank.forward(names, raising=at)
        rank.train(names)
        with suppress(Raised):
            rank.backward(names, raising=at)
        with suppress(Raised):
            rank.backward(names, ending=at)


def replay(rank: Rank, names: Order) -> None:
    """Steps, alone and after forwards and steps, which have fetched ahead."""
    for _ in range(3):
        rank.train(names)
    graph = rank.captured(rank.train, names)
    for _ in range(2):
        rank.forward(names)
        rank.replay(graph)
        rank.replay(graph)
        rank.train(names)
        rank.replay(graph)


def replay_forwards(rank: Rank, names: Order) -> None:
    """Two, captured one right after the other, and after a training that expects a backward."""
    for _ in range(2):
        rank.train(names)
    graphs = [rank.captured(rank.forward, names) for _ in range(2)]
    for which in (1, 1, 0, 1, 0, 0):
        rank.replay(graphs[which])
        rank.write()
    rank.forward(names)
    rank.replay(graphs[0])


def replay_halves(rank: Rank, names: Order) -> None:
    """A forward and its backward, each a graph."""
    for _ in range(2):
        rank.train(names)
    halves = [rank.captured(rank.forward, names), rank.captured(rank.backward, names)]
    for _ in range(2):
        for half in halves:
            rank.replay(half)
        rank.write()
    rank.train(names)


def replay_in_turn(rank: Rank, names: Order) -> None:
    """Two steps, with forwards between their captures and between their replays."""
    for _ in range(2):
        rank.train(names)
    first = rank.captured(rank.train, names)
    rank.forward(names)
    rank.forward(names)
    second = rank.captured(rank.train, names[::-1])
    for _ in range(2):
        rank.replay(first)
        rank.replay(second)
        rank.forward(names)
        rank.replay(second)
        rank.forward(names)


def replay_within(rank: Rank, names: Order) -> None:
    """A forward or a step between an eager forward and its backward."""
    for _ in range(2):
        rank.train(names)
    graphs = [rank.captured(rank.forward, names), rank.captured(rank.train, names)]
    for graph in graphs * 2:
        rank.forward(names)
        rank.replay(graph)
        rank.backward(names)
        rank.write()


def replay_interrupted(rank: Rank, names: Order) -> None:
    """After passes that raised, and before others."""
    for _ in range(2):
        rank.train(names)
    graph = rank.captured(rank.train, names)
    for at in range(len(names)):
        with suppress(Raised):
            rank.forward(names, raising=at)
        rank.replay(graph)
        rank.forward(names)
        with suppress(Raised):
            rank.backward(names, raising=at)
        rank.replay(graph)
        rank.train(names)


Program = Callable[[Rank, Order], None]
PROGRAMS: list[Program] = [
    train,
    drop,
    recompute,
    repeat,
    change_streams,
    interrupt,
    replay,
    replay_forwards,
    replay_halves,
    replay_in_turn,
    replay_within,
    replay_interrupted,
]


def _mistakes(world: World, program: Program) -> list[str]:
    return world.mistakes(lambda rank: program(rank, list(world.shapes)))


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda each: each.__name__)
def test_everything_is_in_order(program: Program, world: str) -> None:
    assert _mistakes(WORLDS[world], program) == []


@st.composite
def _worlds(draw: st.DrawFn) -> World:
    sizes = st.tuples(st.sampled_from([2, 3, 4, 8, 16, 17]), st.sampled_from([1, 4, 8, 9]))
    shapes = dict(zip("abcde", draw(st.lists(sizes, min_size=1, max_size=5)), strict=False))
    kinds = {name: draw(st.sampled_from(["rows", "rows read", "columns"])) for name in shapes}
    return World(
        world_size=draw(st.sampled_from([2, 3])),
        staging_bytes=7 * draw(st.sampled_from([64, 128, 256, 512])),
        shapes=shapes,
        reads=[name for name, kind in kinds.items() if kind == "rows read"],
        columns=[name for name, kind in kinds.items() if kind == "columns"],
        overlap=draw(st.integers(0, 5)) > 0,
    )


ACTIONS = [
    "train",
    "forward",
    "backward",
    "forward, written",
    "forward, raising",
    "backward, raising",
    "backward, ending",
    "backward, recomputing",
    "backward, nested",
    "write",
    "other stream",
    "capture a forward",
    "capture a step",
    "replay",
    "replay",
    "replay",
]


def _execute(rank: Rank, orders: list[list[str]], actions: list[tuple[str, int]]) -> None:
    """Actions in turn; ``number`` is which one, in what order, or where, whatever there is."""
    graphs: list[Graph] = []
    pending: list[list[str]] = []
    for action, number in actions:
        order = orders[number % len(orders)]
        at = number % len(order)
        if action == "train":
            rank.train(order)
        elif action.startswith("forward"):
            with suppress(Raised):
                written = at if "written" in action else None
                rank.forward(order, raising=at if "raising" in action else None, written=written)
                pending.append(order)
        elif action.startswith("backward") and pending:
            order = pending.pop()
            at = number % len(order)
            with suppress(Raised):
                rank.backward(
                    order,
                    raising=at if "raising" in action else None,
                    ending=at if "ending" in action else None,
                    recomputed=[at] if "recomputing" in action else (),
                    nested=[at] if "nested" in action else (),
                )
            if "ending" in action:
                rank.forward(order)  # until a pass begins nothing tells of the end of that one
        elif action == "write":
            rank.write()
        elif action == "other stream":
            # Layers wait for each other, but what else changes streams waits by itself.
            rank.use(rank.streams[number % 2], waiting=True)
        elif action.startswith("capture"):
            graphs.append(rank.captured(rank.train if "step" in action else rank.forward, order))
        elif action == "replay" and graphs:
            rank.replay(graphs[number % len(graphs)])


@given(
    world=_worlds(),
    orders=st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=6), min_size=1, max_size=3),
    actions=st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 5)), max_size=20),
)
def test_any_program_is_in_order(
    world: World, orders: list[list[int]], actions: list[tuple[str, int]]
) -> None:
    names = list(world.shapes)
    named = [[names[each % len(names)] for each in order] for order in orders]
    assert world.mistakes(lambda rank: _execute(rank, named, actions)) == []


def _is_caught() -> bool:
    """By any program: two ranks suffice, and the first programs are the fastest."""
    worlds = [WORLDS[name] for name in ("two ranks", "one layer", "cut into cells")]
    return any(_mistakes(world, program) for program in PROGRAMS for world in worlds)


def _waits() -> Iterator[tuple[str, int]]:
    """Every line of the library where a stream waits for an event or a stream."""
    for module in (peer, ring):
        assert module.__file__ is not None
        for number, line in enumerate(Path(module.__file__).read_text().splitlines(), start=1):
            if re.search(r"\.wait(_stream)?\(", line):
                yield module.__file__, number


@contextmanager
def _without(wait: tuple[str, int]) -> Iterator[None]:
    def unless_called_there(original: Callable[[Any, Any], None]) -> Any:
        def method(self: Any, other: Any) -> None:
            caller = sys._getframe(1)
            if (caller.f_code.co_filename, caller.f_lineno) != wait:
                original(self, other)

        return method

    with (
        patch.object(Event, "wait", unless_called_there(Event.wait)),
        patch.object(Stream, "wait_stream", unless_called_there(Stream.wait_stream)),
    ):
        yield


@pytest.mark.parametrize("wait", [*_waits()], ids=lambda wait: f"{Path(wait[0]).stem}-{wait[1]}")
def test_every_wait_is_needed(wait: tuple[str, int]) -> None:
    with _without(wait):
        assert _is_caught()


def _end_pass_without_join(peers: PeerTransport) -> None:
    if not peers._capture:
        peers._begin_epoch()


def _same_flag(lane: Lane) -> None:
    lane._memory.barrier(lane._index, 0, lane.stream)


_forget = Lane.forget


def _forget_nothing(lane: Lane) -> None:
    if not hasattr(lane, "come"):  # it is made
        _forget(lane)


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


BREAKS: dict[str, Callable[[], Any]] = {
    "no fence": lambda: patch.object(Lane, "fence", _nothing),
    "flags that do not alternate": lambda: patch.object(Lane, "meet", _same_flag),
    "events of before": lambda: patch.object(Lane, "forget", _forget_nothing),
    "a pass that ends without a join": lambda: patch.object(
        PeerTransport, "end_pass", _end_pass_without_join
    ),
    "a pass that does not end": lambda: patch.object(PeerTransport, "end_pass", _nothing),
    "an epoch that does not begin": lambda: patch.object(PeerTransport, "_begin_epoch", _nothing),
    "averages that nothing waits for": lambda: patch.object(PeerTransport, "averaged", _nothing),
    "an exception that is not settled": lambda: patch.object(PeerTransport, "settle", _nothing),
}


@pytest.mark.parametrize("broken", BREAKS)
def test_what_keeps_order_is_needed(broken: str) -> None:
    with BREAKS[broken]():
        assert _is_caught()
