"""Exchanges between ranks in order, cell by cell, beside the computation."""

from __future__ import annotations

import torch

from rtp_wrap.transport.area import WINDOW, Area
from rtp_wrap.transport.cells import PeerMemory

#: Flags of barriers that are none of an exchange; those of exchanges are 0 and 1, in turn. In a
#: graph, which may follow any of its own barriers and any other, it is 2; else 3 and 4, in turn.
_FENCE_IN_GRAPH, _FENCES = 2, (3, 4)


class Events:
    """One for each of the last ``WINDOW`` exchanges; for an earlier one, that of a later one."""

    def __init__(self) -> None:
        self._events = [torch.cuda.Event() for _ in range(WINDOW)]

    def of(self, number: int) -> torch.cuda.Event:
        return self._events[number % WINDOW]


class Lane:
    """A sequence of barriers, a part of the staging, and a stream if there is one of its own."""

    def __init__(
        self, memory: PeerMemory, index: int, stream: torch.cuda.Stream | None, area: Area
    ) -> None:
        self._memory, self._index = memory, index
        self.stream, self.area = stream, area
        #: Of the last exchange.
        self.number = -1
        #: That of the transport, when this lane was last used.
        self.epoch = 0
        self._flag = self._fence = 0
        self.forget()

    def forget(self) -> None:
        """The events of before belong to another graph, or to none, and all of them are over."""
        self.area.forget()
        if self.stream is not None:
            #: The computation has put something there; all ranks have met; all pulls have come.
            self.given, self.met, self.come = Events(), Events(), Events()

    def meet(self) -> None:
        """The barrier of an exchange."""
        self._flag ^= 1
        self._memory.barrier(self._index, self._flag, self.stream)

    def fence(self, *, in_graph: bool) -> None:
        """A barrier that is none of an exchange."""
        flag = _FENCE_IN_GRAPH
        if not in_graph:
            self._fence ^= 1
            flag = _FENCES[self._fence]
        self._memory.barrier(self._index, flag, self.stream)
