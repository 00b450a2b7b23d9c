"""A cell on its way into this rank's memory, ahead of the computation."""

from __future__ import annotations

from typing import NamedTuple

import torch

from rtp_wrap.transport.cells import Cell, Tiles
from rtp_wrap.transport.foresight import Context, Visit, Visited


class Expected(NamedTuple):
    """A cell that comes, and how its visit is known."""

    visit: Visit
    weight: Visited
    position: int
    context: Context

    @property
    def cell(self) -> Cell:
        return self.visit.cells[self.position]


class Fetched(NamedTuple):
    """A cell that is there, or on its way: with the exchange of this number."""

    what: Expected
    number: int
    versions: tuple[int, int]
    tiles: Tiles
    come: torch.cuda.Event | None

    def is_of(self, visit: Visit, index: int) -> bool:
        return self.what.visit is visit and self.what.position == index

    @property
    def is_outdated(self) -> bool:
        """Whether its weight was written since."""
        return self.versions != self.what.weight.versions
