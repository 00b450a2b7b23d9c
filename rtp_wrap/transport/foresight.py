"""Which site comes next, as far as the last time tells."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor
from torch.utils.weak import WeakIdRef

from rtp_wrap.transport.cells import Cell


class Visit:
    """A site in one direction of the pass, and the tiles of its weight, of ``dtype``.

    ``reads``: it reads from the memories of owners, which is not done ahead of it. One and the same
    object comes again whenever the same weight has the same visit, and it keeps no weight alive.
    """

    __slots__ = ("_weight", "cells", "dtype", "event", "followed", "reads")

    def __init__(
        self, event: str, weight: DTensor, dtype: torch.dtype, cells: list[Cell], reads: bool
    ) -> None:
        self.event, self.dtype, self.cells, self.reads = event, dtype, cells, reads
        self._weight = WeakIdRef(weight)
        #: What came after it the last time, by what had come before it.
        self.followed: dict[Visit | None, Visit | None] = {}

    @property
    def weight(self) -> DTensor | None:
        """``None`` once its model is gone."""
        return self._weight()


#: The visit before, and the latest one.
Context = tuple[Visit | None, Visit | None]


class Foresight:
    """Learns which visit follows which two others.

    What is remembered depends on the order of sites alone, which is the same on all ranks, so that
    all of them expect the same. Copies of a model have visits of their own: each is followed by
    what is its own. Nothing is expected across the beginning of an outermost forward: weights may
    be written before it, and not every write can be seen.
    """

    def __init__(self) -> None:
        self.context: Context = (None, None)
        self._begun = True

    def begin(self) -> None:
        """An outermost forward begins, or something went wrong."""
        self._begun = True

    @property
    def begun(self) -> bool:
        """Whether an outermost forward began since the visit before."""
        return self._begun

    def visit(self, now: Visit) -> None:
        """This is what came."""
        before, latest = self.context
        if latest is not None:
            latest.followed[before] = None if self._begun else now
        self._begun = False
        self.context = latest, now

    @staticmethod
    def after(context: Context) -> Visit | None:
        """What came after those two the last time."""
        before, latest = context
        return None if latest is None else latest.followed.get(before)
