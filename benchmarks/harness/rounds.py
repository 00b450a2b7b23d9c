"""Interleaved rounds: each has one trial of every strategy, every other one in reverse order."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from harness.comparison import Comparison, Run
from harness.crew import Crew, TrialError
from harness.trial import run_trial


class Crews:
    """The ranks that trials run on: ``ranks`` of them, and one alone for "single".

    They start with their first trial; ``timeout`` is the most seconds that one may take.
    """

    def __init__(self, ranks: int, timeout: float) -> None:
        # A rank has as many threads as "single" has, or on a CPU they would not be compared.
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
        self._all = Crew(ranks, timeout)
        self._alone = self._all if ranks == 1 else Crew(1, timeout)

    def __enter__(self) -> Crews:
        return self

    def __exit__(self, *exception: object) -> None:
        for crew in (self._all, self._alone):
            crew.close()

    def of(self, strategy: str) -> Crew:
        """The ranks that ``strategy`` runs on."""
        return self._alone if strategy == "single" else self._all


def interleaved(
    comparison: Comparison,
    strategies: Sequence[str],
    rounds: int,
    crews: Crews,
    advance: Callable[[str], None],
) -> Iterator[Run]:
    """Every strategy once a round, until it fails; all runs are added to ``comparison``.

    ``advance`` is called ``rounds * len(strategies)`` times, with a message.
    """
    failed: set[str] = set()
    for turn in range(rounds):
        for name in strategies[:: -1 if turn % 2 else 1]:
            if name in failed:
                advance(f"{name}, round {turn + 1}: failed before")
                continue
            trial = replace(comparison.trial, strategy=name)
            try:
                run = Run.of(name, turn, crews.of(name).run(run_trial, trial))
            except TrialError as error:
                if error.kind != "out of memory":
                    print(error, file=sys.stderr, flush=True)
                run = Run(name, turn, failure=error.kind)
                failed.add(name)
            comparison.add(run)
            yield run
            advance(f"{name}, round {turn + 1}: {run}")
