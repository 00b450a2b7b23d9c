"""The largest depth that fits into a budget, found by few attempts of which fewer fail.

A failure costs its ranks. What a step needs is nearly affine in the depth, so depths are guessed
by the line through what has been measured. Where the cost is affine:

    attempt   depth
    1         1
    2         where the line through (0 layers, 0 bytes) and it meets the budget: survives
    3         where the line through the last two survivors does: the answer
    4         the next one: fails, which proves it

Where the line is flat or leads to what has failed, the depth is doubled or the bracket halved, by
whichever is less; with a cost that bends, that finds a better line.
"""

from __future__ import annotations

#: So many attempts follow the line, whatever the costs are.
GUIDED = 8


class Bisection:
    """Finds the largest depth of 1 … ``most`` that survives, if all smaller ones do as well.

    ``lower`` survives, ``upper`` does not (0 and ``most + 1`` until one has); costs have the unit
    of the ``budget``. They guide, and decide nothing:

        while (depth := search.next()) is not None:
            search.survived(depth, cost)  # or search.failed(depth)
    """

    def __init__(self, budget: int, most: int) -> None:
        if budget < 1 or most < 1:
            raise ValueError(f"budget={budget}, most={most}: both must be at least 1")
        self.lower, self.upper = 0, most + 1
        self._budget, self._most = budget, most
        self._last = ((0, 0), (0, 0))  # two survivors: depth and cost
        self._guided = 0

    def next(self) -> int | None:
        """The depth to try, between the bounds; ``None`` when ``lower`` is the answer."""
        if self.lower + 1 == self.upper:
            return None
        if self.lower == 0:
            return 1
        if (guess := self._by_line()) is not None:
            return guess
        return min(2 * self.lower, (self.lower + self.upper) // 2)

    def survived(self, depth: int, cost: int) -> None:
        """The ``depth`` that ``next`` gave did, at this cost."""
        self._count(depth)
        self.lower = depth
        self._last = (self._last[1], (depth, cost))

    def failed(self, depth: int) -> None:
        """The ``depth`` that ``next`` gave did not survive."""
        self._count(depth)
        self.upper = depth

    def _count(self, depth: int) -> None:
        if depth != self.next():
            raise ValueError(f"depth {depth} is not the one to try, which is {self.next()}")
        self._guided += depth == self._by_line()

    def _by_line(self) -> int | None:
        """The last new depth that the line has within the budget, or the next one."""
        (first, low), (second, high) = self._last
        if high <= low or self._guided >= GUIDED:
            return None
        met = second + (self._budget - high) * (second - first) // (high - low)
        guess = max(self.lower + 1, min(met, self._most))
        return guess if guess < self.upper else None
