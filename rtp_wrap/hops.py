"""The moving part of a rotation: lanes of tiles in staging slots, and the hops between ranks.

Who owns what memory: the home shard is the parameter's and is only read. A lane owns at most two
slots of the staging: one for the tile in use, one for the tile arriving. When a hop has landed, the
slot of the tile before is free again. So two lanes need four slots where hops overlap with
the computation, and three where they take turns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType

import torch
import torch.distributed as dist

from rtp_wrap.ring import Ring
from rtp_wrap.transport.p2p import TAG_MASK


def backward_slots(
    weights: torch.dtype, sums: torch.dtype, *, dgrad: bool, wgrad: bool, overlap: bool
) -> tuple[int, torch.dtype]:
    """How many slots a backward needs, and the widest dtype that a tile in one of them has.

    Weights travel in the dtype ``weights`` for ``dgrad``, accumulators in ``sums`` for ``wgrad``.
    """
    slots = 2 if not (dgrad and wgrad) else 4 if overlap else 3
    return slots, max((weights, sums) if wgrad else (weights,), key=lambda each: each.itemsize)


class Rotation:
    """All hops of one site in one direction of the pass; a context manager.

    Leaving it waits for every posted hop, also by an exception, so that nothing is in flight
    between sites. ``event`` names the site and the direction, ``slots`` is how many it needs.
    """

    def __init__(self, ring: Ring, event: str, slots: int) -> None:
        self._ring = ring
        self._event = event
        self._free = list(ring.staging.slots(slots))
        self._pending: list[dist.Work] = []
        self._hops = 0

    def __enter__(self) -> Rotation:
        self._ring.begin(self._event)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._wait()
        except BaseException:
            self._ring.interrupt(self._hops)
            raise
        if kind is not None:
            self._ring.interrupt(self._hops)

    @contextmanager
    def turn(self, hops: Sequence[Hop]) -> Iterator[None]:
        """One step: the hops travel while the block computes, or after it without overlap."""
        if self._ring.overlap:
            self._post(hops)
            yield
            self._wait()
            for hop in hops:
                hop.land()
        else:
            yield
            for hop in hops:
                self._post([hop])
                self._wait()
                hop.land()

    def take(self) -> torch.Tensor:
        return self._free.pop()

    def give(self, slot: torch.Tensor) -> None:
        self._free.append(slot)

    def _post(self, hops: Sequence[Hop]) -> None:
        if hops:
            self._hops += 1
            # Two numbers apart: each lane of a hop counts on by one.
            tag = (self._ring.lockstep.digest + 2 * self._hops) & TAG_MASK
            self._pending = self._ring.transport.post([hop.depart() for hop in hops], tag)

    def _wait(self) -> None:
        """Wait for all of them even if one fails, then raise the first failure."""
        pending, self._pending = self._pending, []
        failure: BaseException | None = None
        for work in pending:
            try:
                work.wait()
            except RuntimeError as error:
                failure = failure or error
        if failure is not None:
            raise self._ring.not_answered(f"{self._event}: hop {self._hops}") from failure


class Lane:
    """One kind of tile (weights or accumulators) on its way through this rank."""

    def __init__(self, rotation: Rotation, dtype: torch.dtype) -> None:
        self._rotation = rotation
        self._dtype = dtype
        self._slot: torch.Tensor | None = None
        self._tile: torch.Tensor | None = None

    @property
    def tile(self) -> torch.Tensor:
        """The tile in use, of the shape of its rectangle."""
        assert self._tile is not None
        return self._tile

    def load(self, home: torch.Tensor) -> None:
        """Begin with a part of the home shard, read in place if a hop can send it as it is."""
        if home.dtype == self._dtype and home.is_contiguous():
            self._replace(None, home)
        else:
            self.start(home.shape)
            self.tile.copy_(home)

    def start(self, shape: Sequence[int]) -> None:
        """Begin with a tile of ``shape`` that nobody has written to yet."""
        self._replace(*self._take(shape))

    def hop(self, arriving: Sequence[int], into: torch.Tensor | None = None) -> Hop:
        """The hop that sends the tile in use below and brings one of shape ``arriving`` from above.

        The tile lands in a slot, or in ``into`` if that is given and contiguous.
        """
        return Hop(self, arriving, into)

    def release(self) -> None:
        """Done with the tile in use."""
        self._replace(None, None)

    def _take(self, shape: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        slot = self._rotation.take()
        numel = math.prod(shape)
        return slot, slot[: numel * self._dtype.itemsize].view(self._dtype).view(*shape)

    def _replace(self, slot: torch.Tensor | None, tile: torch.Tensor | None) -> None:
        if self._slot is not None:
            self._rotation.give(self._slot)
        self._slot, self._tile = slot, tile


class Hop:
    """One transfer of one lane: depart, then land. Each once, in this order."""

    def __init__(self, lane: Lane, arriving: Sequence[int], into: torch.Tensor | None) -> None:
        self._lane = lane
        self._arriving = arriving
        self._into = into
        self._landing: tuple[torch.Tensor | None, torch.Tensor] | None = None

    def depart(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What to send, and where to receive."""
        assert self._landing is None, "a hop departs once"
        if self._into is not None and self._into.is_contiguous():
            assert self._into.dtype == self._lane._dtype
            self._landing = None, self._into
        else:
            self._landing = self._lane._take(self._arriving)
        return self._lane.tile, self._landing[1]

    def land(self) -> None:
        """The transfer is over: the tile that arrived is the one in use."""
        assert self._landing is not None, "a hop lands after it departed"
        self._lane._replace(*self._landing)
