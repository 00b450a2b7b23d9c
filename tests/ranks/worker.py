"""The process of one rank: the pool's handle of it, and what runs inside."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from typing import Any, TypeAlias

import torch
from torch.distributed import TCPStore

from tests.ranks import burial
from tests.ranks.group import DEVICE_TYPE, GROUP_TIMEOUT, join_group
from tests.ranks.outcome import Failure, Outcome
from tests.ranks.task import execute

HOST = "127.0.0.1"
#: What the server that processes are forked from has imported: what optimizers would import at
#: their first step (torch._dynamo), and all of the library and the benchmarks.
PRELOAD = ["hypothesis", "pytest", "torch._dynamo", "matplotlib.pyplot", "harness.language_model"]
#: On CPUs ranks are a ring where tests do not say otherwise, but for this world size: most of what
#: the two transports have in common is tested with either.
PEERS = 2
#: And what some would import for the first layer that they compile. Not where ranks are on GPUs,
#: which nothing may touch before the fork.
COMPILERS = ["torch._dynamo.backends.common", "torch._inductor.pattern_matcher"]
#: Comes last, since what is imported behind it is not frozen.
FREEZE = "tests.freeze"
_STACKS_SIGNAL = signal.SIGUSR1
_STACKS_TIME = 0.2
_END_TIMEOUT = 10.0

#: The arguments of `warnings.filterwarnings`.
WarningFilter: TypeAlias = tuple[Any, str, type[Warning], str, int]


def forkserver() -> ForkServerContext:
    """Starts processes that have imported all of `PRELOAD`."""
    # With Triton, compilers would start processes and threads as they are imported.
    os.environ.setdefault("TORCH_WARM_POOL", "0")
    context = multiprocessing.get_context("forkserver")
    compilers = COMPILERS if DEVICE_TYPE == "cpu" else []
    context.set_forkserver_preload([*PRELOAD, *compilers, FREEZE])
    return context


@dataclass(frozen=True)
class Seat:
    """The place of one rank in a process group whose store listens on `port`."""

    rank: int
    world_size: int
    port: int


class Worker:
    """A process that executes the tasks of one rank, until one fails."""

    def __init__(self, seat: Seat) -> None:
        self.rank = seat.rank
        self._stacks = tempfile.NamedTemporaryFile("r", prefix="rtp-rank-")  # noqa: SIM115
        context = forkserver()
        self.connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_main, args=(seat, theirs, self._stacks.name), daemon=True
        )
        self._process.start()
        theirs.close()

    def send(self, filters: Sequence[WarningFilter], task: bytes) -> None:
        """Start a task under these warning filters."""
        with contextlib.suppress(BrokenPipeError):  # it died, which `receive` will report
            self.connection.send((filters, task))

    def receive(self) -> Outcome:
        """Read the outcome of the task, once `connection` is ready."""
        try:
            outcome: Outcome = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self._process.join(_END_TIMEOUT)
            message = f"died with exit code {self._process.exitcode}"
            return Failure("ChildProcessError", message, message)
        return outcome

    def hung(self, reason: str) -> Failure:
        """Describe where the process hangs, be it in C++ below a Python frame."""
        if self._process.pid is not None and self._process.is_alive():
            os.kill(self._process.pid, _STACKS_SIGNAL)
            time.sleep(_STACKS_TIME)
        return Failure("TimeoutError", reason, f"{reason}\n{self._stacks.read()}")

    def kill(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.join(_END_TIMEOUT)
        self.connection.close()
        self._stacks.close()


def _main(seat: Seat, connection: Connection, stacks: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which kills this
    with open(stacks, "w") as file, contextlib.suppress(EOFError):  # no parent is left
        faulthandler.register(_STACKS_SIGNAL, file)
        outcome = _join(seat)
        burial.arrange()
        connection.send(outcome)
        # A rank that failed leaves, so that gloo tells the ranks which wait for it.
        while not isinstance(outcome, Failure):
            filters, task = connection.recv()
            _set_warning_filters(filters)
            outcome = execute(task)
            connection.send(outcome)
            burial.bury(waiting=False)
    burial.bury()


def _join(seat: Seat) -> Outcome:
    torch.set_num_threads(1)
    if sys.platform == "linux":  # gloo would look up the host name, which need not resolve
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if DEVICE_TYPE == "cpu" and seat.world_size == PEERS:
        os.environ.setdefault("RTP_WRAP_TRANSPORT", "peer")
    try:
        store = TCPStore(HOST, seat.port, timeout=GROUP_TIMEOUT)
        join_group(store, seat.rank, seat.world_size, local_rank=_gpu(seat.rank))
    except Exception as error:
        return Failure.of(error)
    return b""


def _gpu(rank: int) -> int:
    """The GPU of a rank. Where pytest-xdist has several pools, each begins with another one."""
    pool = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    return (rank + pool) % max(1, torch.cuda.device_count())


def _set_warning_filters(filters: Sequence[WarningFilter]) -> None:
    warnings.resetwarnings()
    for arguments in reversed(filters):  # each goes before the ones already there
        warnings.filterwarnings(*arguments)
