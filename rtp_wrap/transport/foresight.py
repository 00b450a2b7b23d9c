"""Which site comes next, as far as the last time tells."""

from __future__ import annotations

import weakref

import torch
from torch.distributed.tensor import DTensor

from rtp_wrap.attached import Attached
from rtp_wrap.transport.cells import Cell

#: How a weight is visited: the event, the dtype of its tiles, and whether it is read.
Way = tuple[str, torch.dtype, bool]


class Visited(Attached):
    """Of a weight: its home shard, its versions, and its visits.

    It is an attribute of the weight, lives as long, and does not refer to it: a cycle would wait
    for the garbage collector, and tensors that have weak references cannot be converted in place.
    """

    __slots__ = ("__weakref__", "_counter", "home", "visits")

    def __init__(self, weight: DTensor) -> None:
        self.home = weight._local_tensor
        with torch.inference_mode(False):  # in which tensors have no versions
            self._counter = weight.detach()  # has the version of the weight
        self.visits: dict[Way, Visit] = {}

    @classmethod
    def of(cls, weight: DTensor) -> Visited:
        """That of ``weight``."""
        known: Visited | None = vars(weight).get("_visited")
        if not known or known.home is not weight._local_tensor:
            weight._visited = known = cls(weight)  # type: ignore[attr-defined]
        return known

    @property
    def versions(self) -> tuple[int, int]:
        """Other ones after any write that torch counts; see ``versions_of``."""
        return self._counter._version, self.home._version


class Visit:
    """A site in one direction of the pass, and the tiles of its weight.

    One and the same object comes again whenever the weight is visited that way; it does not keep
    the weight alive. If it ``reads``, it does so from the memories of owners, and not ahead of
    time.
    """

    __slots__ = ("__weakref__", "_visited", "cells", "event", "followed", "reads")

    def __init__(self, event: str, visited: Visited | None, cells: list[Cell], reads: bool) -> None:
        self.event, self.cells, self.reads = event, cells, reads
        self._visited = None if visited is None else weakref.ref(visited)
        #: What came after it the last time, by what had come before it. Copies of a model come and
        #: go, so it keeps none of them.
        self.followed: weakref.WeakKeyDictionary[Visit, weakref.ref[Visit] | None]
        self.followed = weakref.WeakKeyDictionary()

    @property
    def weight(self) -> Visited | None:
        """``None`` once its model is gone."""
        return None if self._visited is None else self._visited()


#: The visit before, and the latest one.
Context = tuple[Visit, Visit]


class Foresight:
    """Learns which visit follows which two others.

    What is remembered depends on the order of sites alone, which is the same on all ranks, so that
    all of them expect the same. Copies of a model have visits of their own: each is followed by
    what is its own, until it is deleted. Nothing is expected across the beginning of a forward:
    weights may be written before it, and not every write can be seen.
    """

    def __init__(self) -> None:
        start = Visit("start", None, [], False)
        self.context: Context = (start, start)
        self._begun = True

    def begin(self) -> None:
        """A forward begins, or something went wrong."""
        self._begun = True

    @property
    def begun(self) -> bool:
        """Whether a forward began since the visit before."""
        return self._begun

    def visit(self, now: Visit) -> None:
        """This is what came."""
        before, latest = self.context
        latest.followed[before] = None if self._begun else weakref.ref(now)
        self._begun = False
        self.context = latest, now

    @staticmethod
    def after(context: Context) -> Visit | None:
        """What came after those two the last time."""
        before, latest = context
        follower = latest.followed.get(before)
        return None if follower is None else follower()
