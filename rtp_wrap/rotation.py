"""The schedule of a rotation: which owner's tile meets which rank at which step.

Tiles and accumulators move in one direction, from rank ``k + 1`` to rank ``k``. With four ranks,
``tile / accumulator`` by owner:

    step   rank 0   rank 1   rank 2   rank 3
      0    0 / 1    1 / 2    2 / 3    3 / 0
      1    1 / 2    2 / 3    3 / 0    0 / 1
      2    2 / 3    3 / 0    0 / 1    1 / 2
      3    3 / 0    0 / 1    1 / 2    2 / 3

Every rank starts with its own tile, which needs no hop. An accumulator starts one rank below its
owner, gains one rank's part per step, and comes home at the last step, where the owner adds its
own part: ``world_size - 1`` hops for each. A forward uses the tiles alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Step:
    """What one rank does in one step, by owner.

    ``tile`` is consumed in this step while ``next_tile`` is on its way (``None`` in the last
    step). ``accumulator`` gains this rank's part in this step; it arrives from the rank above,
    except in the first step, where it begins here.
    """

    tile: int
    next_tile: int | None
    accumulator: int
    first: bool

    @property
    def last(self) -> bool:
        return self.next_tile is None


def schedule(rank: int, world_size: int) -> Iterator[Step]:
    """The steps of ``rank`` in one rotation of ``world_size`` ranks."""
    for turn in range(world_size):
        after = (rank + turn + 1) % world_size
        yield Step(
            tile=(rank + turn) % world_size,
            next_tile=after if turn + 1 < world_size else None,
            accumulator=after,
            first=turn == 0,
        )
