"""Races between operations on the streams of several ranks, found without running them at once.

Of an operation is known what it comes *after*: what was before it on its stream, what that stream
has waited for, and, past a barrier, all that any rank did before its own. Two operations race if
both touch some memory, one of them writes to it, and neither comes after the other, however far
apart they would be most of the time.

In the end everything is run, in one of the possible orders. Without races all of them have the same
results, so that one is enough to see whether every operation finds what it should.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

#: So many messages tell enough.
_LIMIT = 6


class Access(NamedTuple):
    """Half-open, in bytes from wherever all memory begins."""

    start: int
    end: int
    writes: bool


class Barrier(NamedTuple):
    lane: int
    flag: int


@dataclass(frozen=True, slots=True)
class Operation:
    """One of a sequence; ``after`` are places in it.

    ``run`` does it, and returns ``False`` if it found other values than it should. A ``barrier`` is
    what goes on when all have come, directly ``after`` the operation that tells the others.
    """

    what: str
    rank: int
    after: tuple[int, ...]
    accesses: tuple[Access, ...] = ()
    run: Callable[[], object] | None = None
    barrier: Barrier | None = None

    def __str__(self) -> str:
        return f"{self.what} of rank {self.rank}"


def mistakes_of(operations: Sequence[Operation], ranks: int) -> list[str]:
    """What is wrong with ``operations``, which are run once; empty if nothing is."""
    after = [list(each.after) for each in operations]
    lanes = sorted({each.barrier.lane for each in operations if each.barrier is not None})
    barriers = {lane: _barriers(operations, lane, ranks) for lane in lanes}
    found = []
    for lane, by_rank in barriers.items():
        found += _pair(operations, lane, by_rank, after)
    order = _sorted(after)
    if len(order) < len(operations):
        return [*found, f"{len(operations) - len(order)} operations wait for each other"]
    earlier = _reach(order, after)
    for by_rank in barriers.values():
        for first, second in (pair for own in by_rank for pair in pairwise(own)):
            if not earlier[after[second][0]] >> first & 1:
                found.append(f"two barriers at once: {operations[first]}, {operations[second]}")
    return (found + _run(operations, order, earlier))[:_LIMIT]


def _barriers(operations: Sequence[Operation], lane: int, ranks: int) -> list[list[int]]:
    """Where the barriers of a lane are, by rank."""
    found: list[list[int]] = [[] for _ in range(ranks)]
    for at, each in enumerate(operations):
        if each.barrier is not None and each.barrier.lane == lane:
            found[each.rank].append(at)
    return found


def _pair(
    operations: Sequence[Operation], lane: int, by_rank: list[list[int]], after: list[list[int]]
) -> list[str]:
    """Let all ranks come before any goes on; what is wrong with their numbers and flags."""
    found = []
    counts = [len(each) for each in by_rank]
    if len(set(counts)) > 1:
        found.append(f"ranks have {counts} barriers in lane {lane}")
    flag_before = None
    for together in zip(*by_rank, strict=False):
        flags = {barrier.flag for each in together if (barrier := operations[each].barrier)}
        if len(flags) > 1:
            found.append(f"ranks have flags {flags} at once in lane {lane}")
        if flag_before in flags:
            found.append(f"flag {flag_before} follows itself in lane {lane}")
        (flag_before, *_) = flags
        arrivals = [operations[each].after[0] for each in together]
        for each in together:
            after[each] += arrivals
    return found


def _sorted(after: list[list[int]]) -> list[int]:
    """All operations that can be run, each after those it comes after."""
    missing = [len(each) for each in after]
    followers: list[list[int]] = [[] for _ in after]
    for at, each in enumerate(after):
        for other in each:
            followers[other].append(at)
    order = [at for at, count in enumerate(missing) if not count]
    for at in order:  # grows
        for follower in followers[at]:
            missing[follower] -= 1
            if not missing[follower]:
                order.append(follower)
    return order


def _reach(order: list[int], after: list[list[int]]) -> list[int]:
    """For each operation all that it comes after, and itself, as the bits of a number."""
    earlier = [0] * len(after)
    for at in order:
        bits = 1 << at
        for other in after[at]:
            bits |= earlier[other]
        earlier[at] = bits
    return earlier


def _run(operations: Sequence[Operation], order: list[int], earlier: list[int]) -> list[str]:
    """Run all; races, by the last write and the reads since in every piece of memory.

    With those before them they race only if one of these does.
    """
    found = []
    accesses = [each for operation in operations for each in operation.accesses]
    cuts = sorted({cut for each in accesses for cut in each[:2]})
    writer: list[int | None] = [None] * len(cuts)
    readers: list[list[int]] = [[] for _ in cuts]
    for at in order:
        operation = operations[at]
        for start, end, writes in operation.accesses:
            for piece in range(bisect_left(cuts, start), bisect_left(cuts, end)):
                last = writer[piece]
                rivals = [] if last is None else [last]
                if writes:
                    rivals += readers[piece]
                    writer[piece], readers[piece] = at, []
                else:
                    readers[piece].append(at)
                for rival in rivals:
                    if not earlier[at] >> rival & 1:
                        found.append(f"a race: {operations[rival]}, {operation}")
        if operation.run is not None and operation.run() is False:
            found.append(f"wrong values: {operation}")
    return list(dict.fromkeys(found))
