"""A part of the staging in which cells lie, in turn."""

from __future__ import annotations

from collections import deque

from rtp_wrap.transport.cells import aligned

#: Of how many cells is known where they lie, and events are kept. Whatever lay somewhere before
#: those is treated as the oldest of them.
WINDOW = 16


class Area:
    """``slots`` of ``slot_bytes`` from ``start`` on, used in turn.

    Cells lie one behind the other in a slot, until the next one does not fit there. So with two
    slots a cell never takes the place of the one before it. Where a cell comes to lie depends on
    those before it alone.
    """

    def __init__(self, start: int, slot_bytes: int, slots: int) -> None:
        self._start, self._slot_bytes, self._slots = start, slot_bytes, slots
        self.forget()

    def forget(self) -> None:
        """Nothing lies here."""
        self._cells: deque[tuple[int, int, int]] = deque(maxlen=WINDOW)
        self._slot = self._used = 0

    def rewind(self) -> None:
        """The next cell begins a slot, so that what repeats does so in the same places."""
        self._used = self._slot_bytes

    def take(self, nbytes: int, number: int) -> tuple[int, int]:
        """Where the cell of this number lies, and the number of the last one that lay there.

        Numbers are consecutive; what is known of no longer counts as ``number - WINDOW``.
        """
        assert nbytes <= self._slot_bytes
        if self._used + nbytes > self._slot_bytes:
            self._slot, self._used = (self._slot + 1) % self._slots, 0
        at = self._slot * self._slot_bytes + self._used
        end = at + nbytes
        self._used += aligned(nbytes)
        before = number - WINDOW
        for start, stop, other in self._cells:
            if start < end and at < stop and other > before:
                before = other
        self._cells.append((at, end, number))
        return self._start + at, before
