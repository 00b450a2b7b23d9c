"""What comes of a task on one rank: its pickled result, or a failure."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class Failure:
    """What a rank raised, or why it did not answer."""

    type_name: str
    message: str
    traceback: str

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """Describe an exception, without the frame that caught it."""
        below = error.__traceback__.tb_next if error.__traceback__ else None
        text = "".join(traceback.format_exception(type(error), error, below))
        return cls(type(error).__name__, str(error), text)


Outcome: TypeAlias = bytes | Failure


def any_failed(outcomes: Sequence[Outcome]) -> bool:
    """Whether there is a failure among the outcomes."""
    return any(isinstance(outcome, Failure) for outcome in outcomes)


class RankError(AssertionError):
    """Ranks raised, died or hung; the message says which, and where."""

    def __init__(self, outcomes: Sequence[Outcome]) -> None:
        self.failures = {rank: o for rank, o in enumerate(outcomes) if isinstance(o, Failure)}
        ranks = ", ".join(map(str, self.failures))
        parts = [f"failed on {len(self.failures)} of {len(outcomes)} ranks: {ranks}"]
        parts += [f"--- rank {rank} ---\n{f.traceback}" for rank, f in self.failures.items()]
        super().__init__("\n\n".join(parts))
