"""What rtp_wrap is to reach beside FSDP2 and a single GPU, and whether it does.

    python benchmarks/targets.py
    python benchmarks/targets.py --rows eager short --rounds 7

Each row is a setting of its own, measured as compare.py does: interleaved rounds, every other one
in reverse order, ratios that are medians of ratios within a round. "single", the plain step on one
GPU, runs where there is a target for it. Peaks are of allocated memory, rtp_wrap's staging
included. A target that is missed is a result; the exit code is 1 if losses disagree or anything but
memory made a trial fail.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from harness import options, progress, report
from harness.comparison import Comparison, Row, Run
from harness.report import Table
from harness.rounds import Crews, interleaved
from harness.strategies import STRATEGIES, Setting
from harness.trial import Trial


@dataclass(frozen=True)
class Target:
    """Of rtp: tokens/s, at least, and peak allocated memory, at most, as ratios.

    ``speed`` and ``peak`` are of FSDP2's, ``single`` is of the plain step on one GPU.
    """

    speed: float
    peak: float
    single: float | None = None


BF16, MIXED = Setting(precision="bf16"), Setting(precision="mixed")


@dataclass(frozen=True)
class Goal:
    """A setting, and its target on four ranks and more; ``on_two``, if given, is that on two."""

    label: str
    target: Target
    on_two: Target | None = None
    model: str = "llama-8b-layers"
    layers: int | None = None
    batch_size: int = 2
    seq_len: int = 4096
    setting: Setting = BF16
    ours: str = "rtp"

    def on(self, ranks: int) -> Target:
        """The target on so many ranks."""
        return self.on_two if ranks == 2 and self.on_two is not None else self.target


GOALS = {
    "eager": Goal(
        "8 layers, bf16, 2 × 4096 tokens, eager",
        Target(speed=1.05, single=0.97, peak=0.94),
        on_two=Target(speed=1.03, peak=0.95),
    ),
    "compiled": Goal(
        "8 layers, bf16, 2 × 4096 tokens, compiled per block",
        Target(speed=1.03, peak=0.96),
        setting=replace(BF16, compile=True),
    ),
    "short": Goal(
        "8 layers, bf16, 1 × 2048 tokens",
        Target(speed=1.05, single=0.85, peak=0.78),
        batch_size=1,
        seq_len=2048,
    ),
    "graph": Goal(
        "8 layers, bf16, 1 × 2048 tokens, rtp's step as one CUDA graph",
        Target(speed=1.05, single=0.85, peak=0.78),
        batch_size=1,
        seq_len=2048,
        ours="rtp-graph",
    ),
    "deep": Goal("32 layers, bf16, 2 × 4096 tokens", Target(speed=1.04, peak=0.94), layers=32),
    "mixed": Goal(
        "8 layers, fp32 with bf16 compute, 2 × 4096 tokens",
        Target(speed=1.05, peak=0.92),
        setting=MIXED,
    ),
    "8b": Goal(
        "Llama-3-8B's shape, fp32 with bf16 compute, 1 × 8192 tokens",
        Target(speed=1.04, peak=0.94),
        model="llama-8b",
        batch_size=1,
        seq_len=8192,
        setting=MIXED,
    ),
}
#: In the place of every model, and of so many tokens one, where it is to run and no more.
TINY_MODEL, TINY_TOKENS = "llama-tiny", 256


class Attempt:
    """What was measured for one goal, so far."""

    def __init__(self, name: str, arguments: argparse.Namespace) -> None:
        self.name, self.goal = name, GOALS[name]
        self.target = self.goal.on(arguments.ranks)
        alone = () if self.target.single is None else ("single",)
        self.strategies = (*alone, "fsdp", self.goal.ours)
        trial = _trial(self.goal, arguments)
        self.comparison = Comparison(trial, arguments.ranks, baseline="fsdp")

    @property
    def begun(self) -> bool:
        return bool(self.comparison.runs)

    @property
    def good(self) -> bool:
        """Being out of memory is a result, too."""
        return all(row.good for row in self.comparison.rows())

    def ratios(self) -> dict[str, float | None]:
        """By the names that they have in ``Target``; ``None`` is not known."""
        ours, theirs = self._rows()
        peak = None
        if ours.allocated and theirs.allocated:
            peak = ours.allocated / theirs.allocated
        return {"speed": ours.speed, "single": ours.speed_single, "peak": peak}

    def cells(self) -> list[str | None]:
        """Of the table: what a step takes, ratios beside their targets, and whether all agree."""
        ours, theirs = self._rows()
        ratios = self.ratios()
        agree = all(row.agrees for row in self.comparison.rows())
        return [
            self.goal.label,
            *(each.failure or _milliseconds(each.seconds) for each in (ours, theirs)),
            _beside(ratios["speed"], self.target.speed, "≥", ours.failure),
            _beside(ratios["single"], self.target.single, "≥", ours.failure),
            _beside(ratios["peak"], self.target.peak, "≤", ours.failure),
            "yes" if agree else "no",
        ]

    def details(self) -> Table:
        """A row per strategy."""
        table = self.comparison.table()
        table.title = self.goal.label
        return table

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "label": self.goal.label,
            "target": asdict(self.target),
            "ratios": self.ratios(),
            "comparison": self.comparison.as_json(),
        }

    def _rows(self) -> tuple[Row, Row]:
        """Of rtp and of FSDP2; empty where there was no run yet."""
        rows = {row.strategy: row for row in self.comparison.rows()}
        ours = self.goal.ours
        return rows.get(ours, Row(ours)), rows.get("fsdp", Row("fsdp"))


def main() -> int:
    """Measure, show the table; 1 if losses disagree or anything but memory made a trial fail."""
    arguments = _arguments()
    attempts = [Attempt(name, arguments) for name in dict.fromkeys(arguments.rows)]
    code = 0
    try:
        for _ in _runs(attempts, arguments):
            _write(attempts, arguments)
    except KeyboardInterrupt:
        print(f"interrupted; what was measured is in {arguments.out}", file=sys.stderr)
        code = 130
    if any(each.begun for each in attempts):
        report.show(_table(attempts, arguments))
        print(f"written to {arguments.out}")
    return code or int(not all(each.good for each in attempts))


def _runs(attempts: Sequence[Attempt], arguments: argparse.Namespace) -> Iterator[Run]:
    """All rounds of one attempt after the other."""
    rounds = arguments.rounds
    total = rounds * sum(len(each.strategies) for each in attempts)
    with (
        Crews(arguments.ranks, arguments.timeout) as crews,
        progress.steps(total, "targets") as advance,
    ):
        for each in attempts:
            tell = functools.partial(_tell, advance, each.name)
            yield from interleaved(each.comparison, each.strategies, rounds, crews, tell)


def _tell(advance: Callable[[str], None], name: str, message: str) -> None:
    advance(f"{name}: {message}")


def _write(attempts: Sequence[Attempt], arguments: argparse.Namespace) -> None:
    begun = [each for each in attempts if each.begun]
    tables = [_table(attempts, arguments), *(each.details() for each in begun)]
    first, *rest = (table.markdown() for table in tables)
    report.write(
        arguments.out,
        "targets",
        data={"ranks": arguments.ranks, "rows": [each.as_json() for each in begun]},
        markdown="\n".join(("# Targets\n", first, _notes(arguments), *rest)),
    )


def _table(attempts: Sequence[Attempt], arguments: argparse.Namespace) -> Table:
    columns = (
        *("setting", "rtp, ms/step", "FSDP2, ms/step"),
        *("tokens/s ÷ FSDP2's", "tokens/s ÷ one GPU's", "peak ÷ FSDP2's", "losses agree"),
    )
    tiny = f", of {TINY_MODEL} and 1/{TINY_TOKENS} of the tokens" if arguments.tiny else ""
    table = Table(f"Targets on {arguments.ranks} ranks{tiny}", columns)
    for each in attempts:
        if each.begun:
            table.add(*each.cells())
    return table


def _milliseconds(seconds: float | None) -> str | None:
    return None if seconds is None else f"{1000 * seconds:.1f}"


def _beside(
    ratio: float | None, target: float | None, sign: str, failure: str | None
) -> str | None:
    """Such as "1.061 (≥ 1.05 met)"; ``sign`` is one of ≥ and ≤. Who failed has met nothing."""
    if target is None:
        return None
    if ratio is None:
        return f"– ({sign} {target:g} {'missed' if failure else 'not measured'})"
    met = ratio >= target if sign == "≥" else ratio <= target
    return f"{ratio:.3f} ({sign} {target:g} {'met' if met else 'missed'})"


def _notes(arguments: argparse.Namespace) -> str:
    return (
        f"Tokens are per rank and step. Ratios of tokens/s per rank are medians of ratios "
        f"within a round, of {arguments.rounds} interleaved rounds; a round is the median of "
        f"{arguments.steps} steps after {arguments.warmup}, each as long as its slowest rank. "
        f"Peaks are allocated memory after the warmup, of the worst rank and round, "
        f"staging included.\n"
    )


def _trial(goal: Goal, arguments: argparse.Namespace) -> Trial:
    tiny = arguments.tiny
    return Trial(
        strategy="fsdp",
        model=TINY_MODEL if tiny else goal.model,
        batch_size=goal.batch_size,
        seq_len=goal.seq_len // TINY_TOKENS if tiny else goal.seq_len,
        setting=goal.setting,
        changes={"layers": None if tiny else goal.layers},
        steps=arguments.steps,
        warmup=arguments.warmup,
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, cuda, count = parser.add_argument, torch.cuda.is_available(), options.positive(int)
    rows = [name for name, goal in GOALS.items() if cuda or not STRATEGIES[goal.ours].graphed]
    names = f"of {', '.join(GOALS)}; default: {' '.join(rows)}"
    add("--rows", nargs="+", choices=GOALS, default=rows, metavar="NAME", help=names)
    ranks = torch.cuda.device_count() or 2
    add("--ranks", type=count, default=ranks, help="default: all GPUs, or 2 on CPU")
    add("--rounds", type=count, default=5, help="trials of each strategy; default: %(default)s")
    add("--steps", type=count, default=6, help="timed ones of a trial; default: %(default)s")
    add("--warmup", type=count, default=3, help="steps before those; default: %(default)s")
    add("--tiny", action="store_true", default=not cuda, help="for a try; always so on CPU")
    seconds = options.positive(float)
    add("--timeout", type=seconds, default=600.0, help="of a trial, s; default: %(default)s")
    add("--out", type=Path, default=Path("runs/targets"), help="directory; default: %(default)s")
    arguments = parser.parse_args()
    if cuda and arguments.ranks > ranks:
        parser.error(f"--ranks {arguments.ranks} of {ranks} GPUs: give at most {ranks}")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
