"""Which site comes next, as far as the last time tells."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor

from rtp_wrap.transport.cells import Cell


@dataclass(frozen=True, slots=True)
class Visit:
    """A site in one direction of the pass, and the tiles of its weight, of ``dtype``.

    ``reads``: it reads from the memories of owners, which is not done ahead of it.
    """

    event: str
    weight: DTensor
    dtype: torch.dtype
    cells: list[Cell]
    reads: bool = False


Context = tuple[str, str]


class Foresight:
    """Learns which visit follows which two others.

    What is remembered depends on the order of sites alone, which is the same on all ranks, so that
    all of them expect the same. Nothing is expected across the beginning of an outermost forward:
    weights may be written before it, and not every write can be seen.
    """

    def __init__(self) -> None:
        self._next: dict[Context, Visit | None] = {}
        #: The latest visit, by its event and that of the one before.
        self.context: Context = ("", "")
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
        self._next[self.context] = None if self._begun else now
        self._begun = False
        self.context = self.context[1], now.event

    def after(self, context: Context) -> Visit | None:
        """What came after those two the last time."""
        return self._next.get(context)
