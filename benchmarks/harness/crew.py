"""Ranks that run one trial after another, and are replaced when one of them fails.

A rank that runs out of memory may leave the others waiting in a collective for ever, so after any
failure the parent ends all of them. New ones start with the next trial.
"""

from __future__ import annotations

import os
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from launch import leave

T = TypeVar("T")

#: Others may fail of the same cause; whoever has not reported after so many seconds never will.
GRACE = 5.0


class TrialError(RuntimeError):
    """A trial failed; ``kind`` is "out of memory", "timeout" or "error"."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind = kind


class Crew:
    """``world_size`` ranks of one process group, on GPUs if there are any.

    ``timeout`` is the most seconds one task may take. Functions given to ``run`` and their
    arguments are pickled, so they stand at the top level of a file.
    """

    def __init__(self, world_size: int, timeout: float = 600.0) -> None:
        if world_size < 1:
            raise ValueError(f"world_size is {world_size}; at least one rank is needed")
        if torch.cuda.is_available() and world_size > torch.cuda.device_count():
            raise ValueError(f"{world_size} ranks on {torch.cuda.device_count()} GPUs")
        self.world_size = world_size
        self._timeout = timeout
        self._ranks: list[tuple[Any, Connection]] = []
        self._directory: tempfile.TemporaryDirectory[str] | None = None  # of the ranks' store

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def run(self, task: Callable[..., T], *arguments: Any) -> list[T]:
        """``task(*arguments)`` on every rank; the results in the order of ranks.

        Raises ``TrialError`` if it failed on any.
        """
        if not self._ranks:
            self._start()
        try:
            for _, pipe in self._ranks:
                pipe.send((task, arguments))
            replies = self._replies()
        except BaseException:
            self._end()
            raise
        failures = [reply for reply in replies.values() if reply[0] != "done"]
        if failures or len(replies) < self.world_size:
            self._end()
            # Being out of memory is the cause, if others only noticed that somebody had left.
            order = {"out of memory": 0, "error": 1, "timeout": 2}
            failures = failures or [("timeout", f"no result within {self._timeout:g} s")]
            raise TrialError(*min(failures, key=lambda failure: order[failure[0]]))
        return [replies[rank][1] for rank in range(self.world_size)]

    def close(self) -> None:
        """Let the ranks end; harmless if there are none."""
        for _, pipe in self._ranks:
            with suppress(BrokenPipeError):  # Ctrl-C on a terminal has ended them, too
                pipe.send(None)
        for process, _ in self._ranks:
            process.join(GRACE)
        self._end()

    def _start(self) -> None:
        # Forked from a server that has imported everything and never touches CUDA. That may run in
        # another environment: ranks get this process' own.
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["harness.trial", "torch._dynamo"])  # optimizers want it
        threads = str(max(1, (os.cpu_count() or 1) // self.world_size))
        environment = {"OMP_NUM_THREADS": threads, **os.environ}
        self._directory = tempfile.TemporaryDirectory(prefix="rtp_wrap-")
        store = Path(self._directory.name, "store").as_uri()
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            arguments = (rank, self.world_size, store, environment, theirs)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._ranks.append((process, ours))

    def _replies(self) -> dict[int, tuple[str, Any]]:
        """What ranks reported; after the first failure others have ``GRACE`` seconds left."""
        waiting = {pipe: rank for rank, (_, pipe) in enumerate(self._ranks)}
        replies: dict[int, tuple[str, Any]] = {}
        deadline = time.monotonic() + self._timeout
        while waiting and (ready := wait(waiting, max(0.0, deadline - time.monotonic()))):
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = waiting.pop(pipe)
                try:
                    replies[rank] = pipe.recv()
                except EOFError:  # killed: by the system, if the host's memory was exhausted
                    self._ranks[rank][0].join(GRACE)
                    code = self._ranks[rank][0].exitcode
                    replies[rank] = ("error", f"rank {rank} ended with exit code {code}")
                if replies[rank][0] != "done":
                    deadline = min(deadline, time.monotonic() + GRACE)
        return replies

    def _end(self) -> None:
        for process, pipe in self._ranks:
            process.kill()
            process.join()
            pipe.close()
        self._ranks = []
        if self._directory is not None:
            self._directory.cleanup()


def _serve(
    rank: int, world_size: int, store: str, environment: dict[str, str], pipe: Connection
) -> None:
    """Join the group, then do what comes through the pipe until the parent ends."""
    os.environ.clear()
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    joined = False
    while True:
        try:
            if (message := pipe.recv()) is None:
                break
        except (EOFError, KeyboardInterrupt):
            break
        task, arguments = message
        try:
            if not joined:
                dist.init_process_group(
                    "nccl" if cuda else "gloo",
                    init_method=store,
                    rank=rank,
                    world_size=world_size,
                    device_id=device if cuda else None,
                )
                joined = True
            pipe.send(("done", task(*arguments)))
        except KeyboardInterrupt:
            break
        except BaseException as error:
            text = traceback.format_exc().strip()
            pipe.send((_kind(error), f"rank {rank}: {text}"))
    if joined:
        leave()


def _kind(error: BaseException) -> str:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return "out of memory"
    memory = ("can't allocate memory", "out of memory", "Cannot allocate memory", "bad_alloc")
    return "out of memory" if any(text in str(error) for text in memory) else "error"
