"""Proof that all ranks run the same sites in the same order.

Every rank keeps a digest of what it ran. Ranks compare digests on the host when it is cheap and
before it matters: at wrapping, before an optimizer writes weights, and after an exception inside
a rotation. Without it, a rank that left a step early (a caught exception, another branch) could
pair its hops with those of other layers: the wrong tiles, and no error.
"""

from __future__ import annotations

import zlib
from collections import deque
from datetime import timedelta
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

#: Events kept to name the first difference; a training step has three or so per layer.
HISTORY = 8192

_TRAINING = (
    "Every rank must run the same layers in the same order, with the same inputs requiring "
    "gradients; a rank that raised inside a step cannot go on without the others. The weights were "
    "not changed by this step; restart from here or from a checkpoint"
)


class OutOfStepError(RuntimeError):
    """Ranks ran different sites, or one of them left a rotation by an exception."""


class Lockstep:
    """The digest of one rank, comparable with those of the other ranks of ``group``."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = _host_group(group)
        self._rank = group.rank()
        self._world_size = group.size()
        self._count = 0
        self._history: deque[str] = deque(maxlen=HISTORY)
        self.digest = 0

    def record(self, event: str) -> None:
        self._count += 1
        self.digest = zlib.crc32(event.encode(), self.digest)
        self._history.append(event)

    def verify(self, occasion: str, remedy: str = _TRAINING) -> None:
        """Compare with all ranks; they must all be at the same ``occasion``. Blocks the host.

        Raises ``OutOfStepError`` on every rank, naming the first difference. A rank that does not
        come is waited for as long as the group's timeout.
        """
        if self._world_size == 1:
            return
        state = [self._count, self.digest, zlib.crc32(occasion.encode())]
        mine = torch.tensor(state, device="cpu")  # whatever the default device is
        states = [torch.empty_like(mine) for _ in range(self._world_size)]
        accounts: list[tuple[str, int, list[str]]] = [("", 0, [])] * self._world_size
        try:
            dist.all_gather(states, mine, group=self._group)
            if all(torch.equal(state, mine) for state in states):
                self._history.clear()
                return
            dist.all_gather_object(
                accounts, (occasion, self._count, list(self._history)), group=self._group
            )
        except RuntimeError as error:
            last = f" after {self._history[-1]}" if self._history else ""
            raise OutOfStepError(
                f"rank {self._rank} came to {occasion}{last}, but another rank did not come: it "
                f"has raised, died, or runs something else; see its own error first. {remedy}"
            ) from error
        raise OutOfStepError(f"ranks are out of step ({self._difference(accounts)}). {remedy}")

    def _difference(self, accounts: list[tuple[str, int, list[str]]]) -> str:
        """The first event (by number) that is not the same on all ranks, and who did what."""
        first = max(count - len(events) for _, count, events in accounts)
        last = max(count for _, count, _ in accounts)
        for number in range(first, last + 1):
            did = [
                events[number - (count - len(events))] if number < count else f"({occasion})"
                for occasion, count, events in accounts
            ]
            if len(set(did)) > 1:
                break
        else:
            did = [occasion for occasion, _, _ in accounts]
        return ", ".join(f"rank {rank}: {what}" for rank, what in enumerate(did))


#: Made once per group: groups cannot be freed safely while ranks are at different places.
_hosts: WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = WeakKeyDictionary()


def _host_group(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """``group`` itself where it moves CPU tensors, else a Gloo group of the same ranks."""
    backends = dict(
        item.split(":") for item in dist.get_backend_config(group).split(",") if ":" in item
    )
    if backends.get("cpu") == "gloo":
        return group
    if group in _hosts:
        return _hosts[group]
    host = dist.new_group(
        dist.get_process_group_ranks(group),
        timeout=_timeout(group),
        backend="gloo",
        use_local_synchronization=True,
        group_desc="rtp_wrap lockstep",
    )
    assert isinstance(host, dist.ProcessGroup)
    _hosts[group] = host
    return host


def _timeout(group: dist.ProcessGroup) -> timedelta | None:
    """The group's own timeout, so that nothing waits longer than the user allowed."""
    try:
        timeout = group._get_backend(torch.device("cuda")).options._timeout
    except (AttributeError, RuntimeError):
        return None  # not readable on this backend: torch's default
    assert isinstance(timeout, timedelta)
    return timeout
