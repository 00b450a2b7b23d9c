"""Trials of several strategies, and what they say about each of them."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from harness import flops, hardware, sent
from harness.report import Table
from harness.strategies import STRATEGIES
from harness.trial import Outcome, Trial

GIB = 2**30
MIB = 2**20

#: By how much, relatively, losses of the same step may differ, per ``--precision``. Strategies add
#: the same numbers in different orders. In fp32 that is far below what a wrong gradient does to the
#: next losses. In 16 bits the loss itself is rounded, to 2^-8 or 2^-11 of it, by each strategy on
#: every rank, and so are weights after every step: four of these roundings are allowed.
TOLERANCE = {"fp32": 1e-4, "bf16": 2.0**-6, "mixed": 2.0**-6, "fp16": 2.0**-9}


@dataclass(frozen=True)
class Run:
    """One trial: per rank, seconds of the timed steps and losses of all; bytes of the worst rank.

    One that failed has a ``failure``, a ``TrialError.kind``, instead.
    """

    strategy: str
    round: int
    seconds: tuple[tuple[float, ...], ...] = ()
    losses: tuple[tuple[float, ...], ...] = ()
    allocated: int = 0
    reserved: int = 0
    failure: str | None = None

    @classmethod
    def of(cls, strategy: str, turn: int, outcomes: Sequence[Outcome]) -> Run:
        return cls(
            strategy,
            turn,
            tuple(each.seconds for each in outcomes),
            tuple(each.losses for each in outcomes),
            max(each.allocated for each in outcomes),
            max(each.reserved for each in outcomes),
        )

    @property
    def step(self) -> float:
        """Median seconds of a step, each of which takes as long as its slowest rank."""
        return statistics.median(max(step) for step in zip(*self.seconds, strict=True))

    @property
    def loss(self) -> tuple[float, ...]:
        """Of each step, the mean of all ranks'."""
        return tuple(statistics.fmean(step) for step in zip(*self.losses, strict=True))

    def __str__(self) -> str:
        return self.failure or f"{self.step * 1000:.1f} ms/step"


@dataclass(frozen=True)
class Row:
    """One strategy's numbers over all rounds; ``None`` is what was not measured, or is not known.

    ``seconds`` of a step are the median of rounds, ``fastest`` and ``slowest`` its extremes.
    ``speed`` and ``speed_single`` are how many times as fast it is per rank as the baseline and as
    "single". ``agrees`` is false if a loss is not that of the others.
    """

    strategy: str
    failure: str | None = None
    seconds: float | None = None
    fastest: float | None = None
    slowest: float | None = None
    tokens_per_second: float | None = None
    speed: float | None = None
    speed_single: float | None = None
    allocated: int | None = None
    reserved: int | None = None
    utilisation: float | None = None
    sent: int | None = None
    first_loss: float | None = None
    last_loss: float | None = None
    agrees: bool = True

    @property
    def good(self) -> bool:
        """Being out of memory is a result, too."""
        return self.agrees and self.failure in (None, "out of memory")


class Comparison:
    """The runs so far of ``trial`` under several strategies on ``ranks`` ranks."""

    def __init__(self, trial: Trial, ranks: int, baseline: str) -> None:
        self.trial = trial
        self.ranks = ranks
        self.baseline = baseline
        self.runs: list[Run] = []
        self._sent: dict[str, int] = {}  # by strategy

    def add(self, run: Run) -> None:
        self.runs.append(run)

    def rows(self) -> list[Row]:
        """In the order of first runs."""
        return [self._row(name) for name in dict.fromkeys(run.strategy for run in self.runs)]

    def _row(self, name: str) -> Row:
        runs = [run for run in self.runs if run.strategy == name]
        failure = next((run.failure for run in runs if run.failure), None)
        if failure is not None:
            return Row(name, failure)
        steps = [run.step for run in runs]
        speed = self.trial.tokens / statistics.median(steps)
        work = self._flops_per_token * speed
        return Row(
            strategy=name,
            seconds=statistics.median(steps),
            fastest=min(steps),
            slowest=max(steps),
            tokens_per_second=speed,
            speed=self._speed(runs, self.baseline),
            speed_single=self._speed(runs, "single"),
            allocated=max(run.allocated for run in runs),
            reserved=max(run.reserved for run in runs),
            utilisation=flops.utilisation(work, hardware.device_name(), self.trial.setting),
            sent=self._sent_by(name),
            first_loss=runs[-1].loss[0],
            last_loss=runs[-1].loss[-1],
            agrees=all(self._agrees(run) for run in runs),
        )

    @functools.cached_property
    def _flops_per_token(self) -> float:
        return flops.per_token(self.trial.spec(), self.trial.seq_len)

    def _sent_by(self, name: str) -> int:
        if name not in self._sent:
            self._sent[name] = sent.per_step(self._trial(name), self.ranks)
        return self._sent[name]

    def _speed(self, runs: Sequence[Run], other: str) -> float | None:
        """How many times as fast as ``other``: the median over rounds that have both."""
        theirs = {run.round: run.step for run in self.runs if run.strategy == other and run.seconds}
        ratios = [theirs[run.round] / run.step for run in runs if run.round in theirs]
        return statistics.median(ratios) if ratios else None

    def _agrees(self, run: Run) -> bool:
        """Whether ``run`` has the baseline's losses, or another's if the baseline has failed.

        "single" has rank 0's part of the batch only: its first loss must be that rank's.
        """
        tolerance = TOLERANCE[self.trial.setting.precision]
        alone = run.strategy == "single" and self.ranks > 1
        others = [
            each
            for each in sorted(self.runs, key=lambda each: each.strategy != self.baseline)
            if each.losses and (each.strategy != "single" or self.ranks == 1)
        ]
        if alone:  # ranks that share one batch have no loss of their own
            others = [each for each in others if not STRATEGIES[each.strategy].shares_batch]
        if not others:
            return True
        if alone:
            return agree(run.losses[0][:1], others[0].losses[0][:1], tolerance)
        return agree(run.loss, others[0].loss, tolerance)

    def _trial(self, name: str) -> Trial:
        return replace(self.trial, strategy=name)

    def table(self) -> Table:
        """A row per strategy."""
        table = Table(
            f"{self.trial.model} on {self.ranks} ranks",
            (
                "strategy",
                "ms/step",
                "min–max",
                "tokens/s per rank",
                f"× {self.baseline}",
                "× single",
                "allocated GiB",
                "reserved GiB",
                "MFU",
                "sent MiB/step",
                "loss",
            ),
        )
        for row in self.rows():
            if row.failure is not None:
                table.add(row.strategy, row.failure, *[None] * (len(table.columns) - 2))
                continue
            table.add(
                row.strategy,
                _number(row.seconds, ".1f", 1000),
                f"{_number(row.fastest, '.1f', 1000)}–{_number(row.slowest, '.1f', 1000)}",
                _number(row.tokens_per_second, ",.0f"),
                _number(row.speed, ".3f"),
                _number(row.speed_single, ".3f"),
                _number(row.allocated, ".3f", 1 / GIB),
                _number(row.reserved, ".3f", 1 / GIB),
                _number(row.utilisation, ".1%"),
                _number(row.sent, ",.1f", 1 / MIB),
                f"{_number(row.first_loss, '.4f')} → {_number(row.last_loss, '.4f')}"
                + ("" if row.agrees else " ✗ disagrees"),
            )
        return table

    def notes(self) -> str:
        """What the table's numbers are, in Markdown."""
        trial, setting = self.trial, self.trial.setting
        precision, rounds = setting.precision, 1 + max(run.round for run in self.runs)
        staging = "rtp_wrap's default" if not setting.staging_mib else f"{setting.staging_mib} MiB"
        limit = "" if trial.memory_mib is None else f", at most {trial.memory_mib:g} MiB per rank"
        lines = [
            f"{trial.spec().parameters():,} parameters in {trial.spec().layers} layers; "
            f"{trial.batch_size} × {trial.seq_len} tokens per rank; {precision}; AdamW; "
            f"compiled: {_yes(setting.compile)}; checkpointed: {_yes(setting.checkpointing)}; "
            f"staging: {staging}{limit}.",
            f"ms/step: median of {rounds} interleaved rounds' medians, and the least and the most "
            f"of them; a round has {trial.steps} steps after {trial.warmup} of warmup, and a step "
            "takes as long as its slowest rank.",
            "×: times as fast per rank, the median of ratios within a round.",
            "Peaks: after the warmup, of the worst rank and round; on CPU both are by how much "
            "resident memory grew, libraries that a process loads in its first trial included.",
            "MFU: PaLM's (arXiv 2204.02311, appendix B), 6 P + 6 L H Q T FLOPs per token: "
            "embedding not counted, causal attention counted half, recomputation not at all.",
            "sent: by formula (harness/sent.py), per rank.",
            f"loss: first and last step's, mean over ranks; must agree within "
            f"{TOLERANCE[precision]:.1e} of itself. That of `single` is of rank 0's part of the "
            "batch, and its first must be that rank's.",
        ]
        return "".join(f"- {line}\n" for line in lines)

    def as_json(self) -> dict[str, Any]:
        """Every run with its trial, and the rows."""
        runs = [{**asdict(run), "trial": self._trial(run.strategy).as_json()} for run in self.runs]
        rows = [asdict(row) for row in self.rows()]
        return {"ranks": self.ranks, "baseline": self.baseline, "runs": runs, "rows": rows}


def agree(losses: Sequence[float], others: Sequence[float], tolerance: float) -> bool:
    """Whether losses of the same steps differ by ``tolerance`` of them at most; NaN never."""
    return all(
        math.isclose(ours, theirs, rel_tol=tolerance)
        for ours, theirs in zip(losses, others, strict=True)
    )


def _number(value: float | None, form: str, factor: float = 1) -> str | None:
    return None if value is None else format(value * factor, form)


def _yes(flag: bool) -> str:
    return "yes" if flag else "no"
