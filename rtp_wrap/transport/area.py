"""A part of the staging in which cells lie, in turn."""

from __future__ import annotations

from rtp_wrap.transport.cells import aligned

#: There are events of so many of the last cells; others count as the oldest of them.
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
        #: The last cell of each slot, as it was filled the last time; as if all had been before 0.
        self._last = [-self._slots] * self._slots
        self._slot = self._used = 0

    def rewind(self) -> None:
        """The next cell begins a slot, so that what repeats does so in the same places."""
        self._used = self._slot_bytes

    def take(self, nbytes: int, number: int) -> tuple[int, int]:
        """Where the cell of this number lies, and the number of the last one that lay in its slot.

        That is, when the slot was filled the time before; ``number - WINDOW`` if that is longer
        ago. Numbers are consecutive, and not below 0.
        """
        assert nbytes <= self._slot_bytes
        if self._used + nbytes > self._slot_bytes:
            self._last[self._slot] = number - 1
            self._slot, self._used = (self._slot + 1) % self._slots, 0
        at = self._slot * self._slot_bytes + self._used
        self._used += aligned(nbytes)
        return self._start + at, max(self._last[self._slot], number - WINDOW)
