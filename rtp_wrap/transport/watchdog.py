"""An end to waiting for a rank that does not come: streams have no timeouts of their own."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import weakref
from datetime import timedelta

import torch

#: So many numbers a stream can write.
_COUNTS = 1 << 32


class Watchdog:
    """Ends the process if its streams get no further for ``timeout``, as NCCL's watchdog does.

    Host and streams count in ``lanes``: the host what it has enqueued, a stream what it has done,
    by writing to ``done[lane]``, pinned host memory. So looking takes no call of CUDA, which could
    break the capture of a graph.
    """

    def __init__(self, lanes: int, timeout: timedelta, rank: int) -> None:
        self.done = torch.zeros(lanes, dtype=torch.int32, device="cpu", pin_memory=True)
        self.enqueued = [0] * lanes
        stop = threading.Event()
        arguments = self.done, self.enqueued, timeout.total_seconds(), rank, stop
        self._thread = threading.Thread(target=_watch, args=arguments, daemon=True)
        self._thread.start()
        weakref.finalize(self, stop.set)


def _watch(
    done: torch.Tensor, enqueued: list[int], timeout: float, rank: int, stop: threading.Event
) -> None:
    before, since = done.tolist(), time.monotonic()
    while not stop.wait(min(1.0, timeout / 10)):
        now = done.tolist()
        if now != before or all((a - b) % _COUNTS == 0 for a, b in zip(now, enqueued, strict=True)):
            before, since = now, time.monotonic()
        elif time.monotonic() - since > timeout:
            print(
                f"[rtp_wrap] rank {rank} has waited {timeout:.0f} s for a tile of another rank, "
                f"which has raised, died, or runs another layer; see its own error. Ending this "
                f"process, whose GPU waits for it",
                file=sys.stderr,
                flush=True,
            )
            os.kill(os.getpid(), signal.SIGABRT)
