"""The memory that a trial needed, or why it came to no end."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from harness.crew import Crew, TrialError
from harness.trial import Trial, run_trial

GIB = 2**30
#: What a report says of its peaks.
CAVEAT = (
    "Peaks are what tensors took."
    if torch.cuda.is_available()
    else "Peaks are how much resident memory grew, libraries included: no comparison on CPU."
)


@dataclass(frozen=True)
class Peak:
    """Bytes of the rank that needed most; ``staging`` are those that rtp has for tiles in flight.

    A trial that failed has none: ``failure`` is a ``TrialError.kind``, and ``reason`` the error's
    last line, if there is more to say than that.
    """

    allocated: int | None = None
    reserved: int | None = None
    staging: int | None = None
    failure: str | None = None
    reason: str | None = None

    def __str__(self) -> str:
        """In GiB, or the failure: a table's cell."""
        return str(self.failure) if self.allocated is None else f"{self.allocated / GIB:.2f}"

    def sentence(self) -> str:
        """With the unit, or the reason."""
        if self.allocated is not None:
            return f"{self} GiB"
        return self.reason or str(self)


def measure(crew: Crew, trial: Trial) -> Peak:
    """Run ``trial`` on all of ``crew``; a failure of any kind is a result as well."""
    try:
        outcomes = crew.run(run_trial, trial)
    except TrialError as error:
        if error.kind == "out of memory":
            return Peak(failure=error.kind)
        return Peak(failure=error.kind, reason=str(error).splitlines()[-1])
    return Peak(
        allocated=max(outcome.allocated for outcome in outcomes),
        reserved=max(outcome.reserved for outcome in outcomes),
        staging=outcomes[0].staging,
    )


def billions(parameters: int) -> str:
    """A model's size."""
    return f"{parameters / 1e9:.3g}B"
