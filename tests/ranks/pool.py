"""A pool of worker processes that are the ranks of one process group.

The workers are forked, in milliseconds, from a server that has imported torch but never touches
CUDA. They see the environment variables that the parent had at the first task. After a failure the
next task gets new workers: nobody knows the state of the old group.
"""

from __future__ import annotations

import contextlib
import re
import time
import warnings
from multiprocessing.connection import wait
from typing import Any

from torch.distributed import TCPStore

from tests.ranks.group import GROUP_TIMEOUT
from tests.ranks.outcome import Failure, Outcome, RankError, any_failed
from tests.ranks.worker import HOST, Seat, WarningFilter, Worker

#: Starting includes the initialisation of CUDA and NCCL.
_START_TIMEOUT = 2 * GROUP_TIMEOUT.total_seconds()
#: How long the other ranks may go on after one failed; they may wait for it in a collective.
_GRACE = 3.0


class Pool:
    """`world_size` processes, one per rank, which all execute the same task at a time."""

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._workers: list[Worker] = []

    def run(self, task: bytes, timeout: float) -> list[Outcome]:
        """Execute a task on every rank; new processes do where an earlier task failed."""
        with contextlib.ExitStack() as stack:
            # Also on Ctrl-C, when the results of this task would come as those of the next one.
            stack.callback(self.close)
            if not self._workers:
                self._start()
            filters = [_arguments(*entry) for entry in warnings.filters]
            for worker in self._workers:
                worker.send(filters, task)
            outcomes = self._collect(timeout)
            if not any_failed(outcomes):
                stack.pop_all()
        return outcomes

    def close(self) -> None:
        """End the processes, whatever they do."""
        for worker in self._workers:
            worker.kill()
        self._workers.clear()

    def _start(self) -> None:
        # The port is bound before a worker learns of it, so nothing can race for it.
        self._store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
        for rank in range(self._world_size):
            self._workers.append(Worker(Seat(rank, self._world_size, self._store.port)))
        joined = self._collect(_START_TIMEOUT)
        if any_failed(joined):
            raise RankError(joined)

    def _collect(self, timeout: float) -> list[Outcome]:
        """Wait for the outcomes of all ranks."""
        outcomes: dict[int, Outcome] = {}
        waiting = {worker.rank: worker for worker in self._workers}
        reason = f"no answer in {timeout:g} s"
        deadline = time.monotonic() + timeout
        while waiting:
            connections = [worker.connection for worker in waiting.values()]
            ready = wait(connections, max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for worker in self._workers:
                if worker.connection not in ready:
                    continue
                del waiting[worker.rank]
                outcome = outcomes[worker.rank] = worker.receive()
                if isinstance(outcome, Failure) and deadline > time.monotonic() + _GRACE:
                    reason = f"no answer {_GRACE:g} s after another rank failed"
                    deadline = time.monotonic() + _GRACE
        outcomes |= {rank: worker.hung(reason) for rank, worker in waiting.items()}
        return [outcomes[worker.rank] for worker in self._workers]


def _arguments(action: Any, message: Any, category: Any, module: Any, line: int) -> WarningFilter:
    """A warning filter as the arguments of `warnings.filterwarnings`."""
    return action, _pattern(message), category, _pattern(module), line


def _pattern(compiled: re.Pattern[str] | str | None) -> str:
    return compiled.pattern if isinstance(compiled, re.Pattern) else compiled or ""
