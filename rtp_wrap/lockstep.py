"""Proof that all ranks run the same sites in the same order.

Every rank keeps a digest of what it ran. Ranks compare digests on the host when it is cheap and
before it matters: at wrapping, before gradients of replicated parameters are averaged, before an
optimizer writes weights, at the end of a forward without gradients, and after an exception inside a
rotation, or one that left a forward. Without it, a rank that left a step early (a caught exception,
another branch) could pair its hops with those of other layers: the wrong tiles, and no error.
"""

from __future__ import annotations

import json
import zlib
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from rtp_wrap.host_group import timeout_of
from rtp_wrap.rings import Rings

#: Events kept to name the first difference; a training step has three or so per layer.
HISTORY = 8192
#: Of so many ranks each has a line of its own in an error.
_FEW = 8
#: How long others may take to say what they did, where a transfer has failed; at most a quarter of
#: the group's timeout.
PATIENCE = timedelta(seconds=3)

_TRAINING = (
    "Every rank must run the same layers in the same order, with the same inputs requiring "
    "gradients; a rank that raised inside a step cannot go on without the others. The weights were "
    "not changed by this step; restart from here or from a checkpoint"
)


class OutOfStepError(RuntimeError):
    """Ranks ran different sites, or one of them left a rotation by an exception."""


#: Of one rank: the occasion, how many events there were, and the latest ones.
_Account = tuple[str, int, list[str]]


class Lockstep:
    """The digest of one rank, comparable with those of all others of ``rings``."""

    def __init__(self, rings: Rings) -> None:
        self._rank, self._world_size = rings.place, rings.size
        if self._world_size > 1:
            # A connection of its own, on the host: comparisons do not wait for a GPU, and ranks
            # that are out of step in their groups still meet here.
            self._store, self._host = rings.connect()
            self._patience = min(PATIENCE, timeout_of(rings.own) / 4)
            # The last comparison outlives `_host`, whose end joins its threads: if one of those let
            # go of tensors last, it would need the interpreter for it, which may be ending, and
            # that aborts the process. With a buffer made once no step leaves anything behind.
            self._comparison: dist.Work | None = None
            #: One row per rank, and this rank's own: (events, digest, occasion).
            self.buffer = torch.zeros(self._world_size + 1, 3, dtype=torch.int64, device="cpu")
        self._count = 0
        self._exchanges = self._failures = 0
        self._history: deque[str] = deque(maxlen=HISTORY)
        self.digest = 0

    def record(self, event: str, exchanges: int = 0) -> None:
        """What this rank does now, and how many exchanges there were before it."""
        self._count += 1
        self.digest = zlib.crc32(f"{event} {exchanges}".encode(), self.digest)
        self._history.append(event)

    @property
    def has_news(self) -> bool:
        """Whether anything was recorded since ranks last compared."""
        return bool(self._history)

    def verify(self, occasion: str, remedy: str = _TRAINING) -> None:
        """Compare with all ranks; they must all be at the same ``occasion``. Blocks the host.

        Raises ``OutOfStepError`` on every rank, naming the first difference. A rank that does not
        come is waited for as long as the group's timeout.
        """
        if self._world_size == 1:
            return
        mine = [self._count, self.digest, zlib.crc32(occasion.encode())]
        *states, sent = self.buffer.unbind()
        sent.copy_(torch.tensor(mine, device="cpu"))  # whatever the default device is
        try:
            self._comparison = comparison = self._host.allgather([states], [sent])
            comparison.wait()
            if all(state.tolist() == mine for state in states):
                self._history.clear()
                return
            # Once this was needed, it is needed at every comparison.
            self._exchanges += 1
            accounts = self._exchange(f"account-{self._exchanges}", occasion)
        except RuntimeError as error:
            last = f" after {self._history[-1]!r}" if self._history else ""
            self._give_up()
            raise OutOfStepError(
                f"rank {self._rank} came to {occasion}{last}, but another rank did not come: it "
                f"has raised, died, or runs something else; see its own error first. {remedy}"
            ) from error
        self._give_up()
        raise OutOfStepError(_out_of_step(accounts, remedy))

    def difference_after(self, failed: str) -> str | None:
        """What ranks did differently before a transfer failed on this one; ``None`` if unknown.

        The others tell once one fails on them, too, which they are given some seconds for.
        """
        if self._world_size == 1:
            return None
        self._failures += 1
        try:
            accounts = self._exchange(f"failure-{self._failures}", failed, self._patience)
        except RuntimeError:  # some have ended, or go on
            return None
        if all(each[1:] == accounts[0][1:] for each in accounts):
            return None
        return _out_of_step(accounts, _TRAINING)

    @contextmanager
    def together(self, part: str, remedy: str) -> Iterator[None]:
        """A block that no rank leaves alone, for what may raise on one of them.

        A rank that has an exception raises that, whatever the others do. The others get an
        ``OutOfStepError`` that quotes it where they compare next, at the latest behind the block.
        """
        try:
            yield
        except OutOfStepError:
            raise  # all ranks have it
        except Exception as error:
            with suppress(OutOfStepError):
                self.verify(f"{part}: {type(error).__name__}: {error}", remedy)
            raise
        self.verify(f"the end of {part}", remedy)

    def _give_up(self) -> None:
        """From here on ranks are out of step, even if they happen to do the same again."""
        self.record(f"an OutOfStepError on rank {self._rank}")

    def _exchange(
        self, name: str, occasion: str, patience: timedelta | None = None
    ) -> list[_Account]:
        """The accounts of all ranks, under a name that each of them gives once.

        Waits for the others ``patience`` long, by default for the group's timeout.
        """
        keys = [f"{name}-{rank}" for rank in range(self._world_size)]
        account: _Account = (occasion, self._count, list(self._history))
        self._store.set(keys[self._rank], json.dumps(account))
        if patience is not None:
            self._store.wait(keys, patience)
        return [json.loads(self._store.get(key)) for key in keys]


def _out_of_step(accounts: list[_Account], remedy: str) -> str:
    return f"ranks are out of step ({_difference(accounts)}). {remedy}"


def _difference(accounts: list[_Account]) -> str:
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
        did = [f"{occasion}, after other exchanges" for occasion, _, _ in accounts]
    return _by_rank(did)


def _by_rank(did: list[str]) -> str:
    """Who did what; of many ranks, those that did the same are told together."""
    if len(did) <= _FEW:
        return ", ".join(f"rank {rank}: {what}" for rank, what in enumerate(did))
    ranks: dict[str, list[int]] = {}
    for rank, what in enumerate(did):
        ranks.setdefault(what, []).append(rank)
    told = []
    for what, whose in ranks.items():
        others = f" and {len(whose) - 1} others" if len(whose) > 1 else ""
        told.append(f"rank {whose[0]}{others}: {what}")
    return ", ".join(told)
