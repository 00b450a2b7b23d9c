"""The ranks that torchrun launched; this process is one of them."""

from __future__ import annotations

import os
import pickle
from datetime import timedelta

import pytest
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from tests.ranks.group import DEVICE_TYPE, join_group
from tests.ranks.outcome import Failure, Outcome, any_failed
from tests.ranks.task import execute


class Launch:
    """Executes tasks in this process, in step with the other ranks."""

    def __init__(self) -> None:
        self._store, self._rank, self._world_size = next(rendezvous("env://"))
        self._task = 0
        self._join()

    def run(self, task: bytes, timeout: float) -> list[Outcome]:
        """Execute a task here and return the outcomes of all ranks; failures cost a new group."""
        outcome = execute(task)
        if isinstance(outcome, Failure) and DEVICE_TYPE == "cpu":
            self.close()  # gloo tells the ranks that wait for this one; NCCL might block
        outcomes = self._exchange(outcome, timeout)
        if any_failed(outcomes):
            self.close()
            self._join()
        return outcomes

    def close(self) -> None:
        """Leave the process group, if that has not happened."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def _join(self) -> None:
        # Tasks are numbered alike on all ranks, so they agree on a new name for each new group.
        store = PrefixStore(f"group-{self._task}", self._store)
        join_group(store, self._rank, self._world_size, int(os.environ["LOCAL_RANK"]))

    def _exchange(self, outcome: Outcome, timeout: float) -> list[Outcome]:
        """Gather the outcomes through the store, which works whatever state the group is in."""
        keys = [f"task-{self._task}-rank-{rank}" for rank in range(self._world_size)]
        self._store.set(keys[self._rank], pickle.dumps(outcome))
        try:
            self._store.wait(keys, timedelta(seconds=timeout))
        except dist.DistError:
            missing = [rank for rank, key in enumerate(keys) if not self._store.check([key])]
            pytest.exit(f"ranks {missing} did not answer in {timeout:g} s", returncode=1)
        outcomes: list[Outcome] = [pickle.loads(self._store.get(key)) for key in keys]
        # All ranks have read the outcomes of the previous task, as they came to this one.
        self._store.delete_key(f"task-{self._task - 1}-rank-{self._rank}")
        self._task += 1
        return outcomes
