"""How much model a GPU's memory holds, by strategy: the original's chart.

    python benchmarks/capacity.py --memory-gib 80
    python benchmarks/capacity.py --part largest --memory-gib 80 --width 7b --precision bf16

    sizes    peaks at the original's four sizes, and how much of the others' peaks rtp saves
    largest  the most layers of ``--width`` that survive, found by bisection

A trial is three AdamW steps on synthetic tokens. Its peak is what tensors took at most, on the rank
that needed most, from the model's preparation on: what a run has to survive. ``--memory-gib`` is
enforced: what CUDA's caching allocator reserves, gaps between tensors included, stays below it; a
context and NCCL's buffers come on top. On CPU peaks are resident memory and the limit is one of the
data segment, where stacks and idle arenas count: that is for trying the script.

What does not end its three steps has not survived, and the result says what it died of. On CPU
that can be other than "out of memory", for a C++ library may end its process for want of it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from harness import chart, models, options, progress, report
from harness.bisection import Bisection
from harness.crew import Crew
from harness.peak import CAVEAT, GIB, Peak, billions, measure
from harness.strategies import STRATEGIES, rings_of
from harness.trial import Trial

SIZES = ("gpt2-medium", "gpt2-large", "gpt2-xl", "neo-2.7b")
OURS = ("rtp", "rtp-inplace")
THEIRS = ("dp", "fsdp-root", "fsdp")


def main() -> int:
    arguments = _arguments()
    study = Study(arguments)
    try:
        with Crew(arguments.ranks, arguments.timeout) as crew:
            if arguments.part != "largest":
                study.measure_sizes(crew)
            if arguments.part != "sizes":
                study.measure_largest(crew)
    except KeyboardInterrupt:
        print(f"interrupted; what was measured is in {arguments.out}", file=sys.stderr)
        return 130
    for table in study.tables():
        report.show(table)
    print(f"written to {arguments.out}")
    return 0


@dataclass(frozen=True)
class Attempt:
    """A strategy's trial of one model."""

    trial: Trial
    layers: int
    parameters: int
    peak: Peak

    def __str__(self) -> str:
        model = f"{self.trial.model}, depth {self.layers}, {billions(self.parameters)}"
        return f"{model}, {_label(self.trial.strategy)}: {self.peak.sentence()}"


class Study:
    """The attempts made so far, all of them on disk."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.sizes: list[Attempt] = []
        self.largest: list[Attempt] = []

    def measure_sizes(self, crew: Crew) -> None:
        """Every strategy at every size."""
        strategies, names = self.arguments.strategies, self.arguments.models
        with progress.steps(len(names) * len(strategies), "sizes") as advance:
            for name in names:
                for strategy in strategies:
                    self.sizes.append(self._attempt(crew, strategy, name))
                    self._write()
                    advance(str(self.sizes[-1]))

    def measure_largest(self, crew: Crew) -> None:
        """Every strategy at growing depth, one strategy after the other."""
        strategies = self.arguments.strategies
        with progress.steps(len(strategies), "largest") as advance:
            for strategy in strategies:
                for attempt in self._search(crew, strategy):
                    self.largest.append(attempt)
                    self._write()
                    print(attempt, flush=True)
                advance(strategy)

    def _search(self, crew: Crew, strategy: str) -> Iterator[Attempt]:
        search = Bisection(_budget(self.arguments.memory_gib), self.arguments.max_layers)
        while (layers := search.next()) is not None:
            attempt = self._attempt(crew, strategy, self.arguments.width, layers)
            if attempt.peak.allocated is None:
                search.failed(layers)
            else:
                search.survived(layers, attempt.peak.allocated)
            yield attempt

    def _attempt(self, crew: Crew, strategy: str, name: str, layers: int | None = None) -> Attempt:
        arguments = self.arguments
        trial = Trial(
            strategy,
            name,
            arguments.batch_size,
            arguments.seq_len,
            options.setting(arguments),
            changes={"layers": layers},
            steps=3,
            warmup=0,
            memory_mib=arguments.memory_gib and arguments.memory_gib * 1024,
            from_start=True,
        )
        spec = trial.spec()
        return Attempt(trial, spec.layers, spec.parameters(), measure(crew, trial))

    def tables(self) -> list[report.Table]:
        """Of the parts that were measured."""
        tables = []
        if self.sizes:
            tables += [self._sizes_table(), self._saved_table()]
        if self.largest:
            tables.append(self._largest_table())
        return tables

    def _sizes_table(self) -> report.Table:
        strategies = self.arguments.strategies
        table = report.Table(
            "Peak memory, GiB per GPU", ("model", "parameters", *map(_label, strategies))
        )
        for name, row in self._by_size().items():
            count = next(iter(row.values())).parameters
            peaks = [str(row[each].peak) if each in row else None for each in strategies]
            table.add(name, billions(count), *peaks)
        return table

    def _saved_table(self) -> report.Table:
        table = report.Table(
            "Memory saved", ("model", *(f"against {_label(each)}" for each in THEIRS))
        )
        for name, row in self._by_size().items():
            for ours in OURS:
                if ours in row:
                    shares = [saved(row[ours], row.get(theirs)) for theirs in THEIRS]
                    cells = [None if share is None else f"{share:.1%}" for share in shares]
                    table.add(f"{name}, {_label(ours)}", *cells)
        return table

    def _largest_table(self) -> report.Table:
        table = report.Table(
            f"The largest model of {self.arguments.width}'s width",
            ("strategy", "layers", "parameters", "peak, GiB", "the smallest that failed"),
        )
        for strategy in self.arguments.strategies:
            best, worst = self._bounds(strategy)
            failure = None if worst is None else f"depth {worst.layers}: {worst.peak}"
            if best is not None:
                sizes = str(best.layers), billions(best.parameters), str(best.peak)
                table.add(_label(strategy), *sizes, failure)
            elif worst is not None:
                table.add(_label(strategy), None, None, None, failure)
        return table

    def _by_size(self) -> dict[str, dict[str, Attempt]]:
        rows: dict[str, dict[str, Attempt]] = {}
        for attempt in self.sizes:
            rows.setdefault(attempt.trial.model, {})[attempt.trial.strategy] = attempt
        return rows

    def _bounds(self, strategy: str) -> tuple[Attempt | None, Attempt | None]:
        """The deepest that survived and the shallowest that did not."""
        tried = [each for each in self.largest if each.trial.strategy == strategy]
        tried.sort(key=lambda each: each.layers)
        survivors = [each for each in tried if each.peak.allocated is not None]
        failures = [each for each in tried if each.peak.allocated is None]
        return survivors[-1] if survivors else None, failures[0] if failures else None

    def _write(self) -> None:
        arguments = self.arguments
        data = {
            "ranks": arguments.ranks,
            "sizes": [asdict(each) for each in self.sizes],
            "largest": [asdict(each) for each in self.largest],
        }
        limit = f"at most {arguments.memory_gib:g} GiB" if arguments.memory_gib else "all memory"
        setting = f"{arguments.ranks} ranks, {limit} per rank; {options.describe(arguments)}."
        errors = [f"- {each}\n" for each in (*self.sizes, *self.largest) if each.peak.reason]
        parts = [f"{setting} {CAVEAT}\n", *(table.markdown() for table in self.tables())]
        markdown = "\n".join([*parts, "".join(errors)])
        report.write(arguments.out, "capacity", data=data, markdown=markdown)
        self._draw()

    def _draw(self) -> None:
        strategies, out = self.arguments.strategies, self.arguments.out
        limit = self.arguments.memory_gib
        if sizes := self._by_size():
            chart.bars(
                out / "sizes.svg",
                list(sizes),
                {
                    _label(each): [
                        _bar(row[each].peak) if each in row else "" for row in sizes.values()
                    ]
                    for each in strategies
                },
                ylabel="GiB per GPU",
                line=(f"{limit:g} GiB", limit) if limit else None,
            )
        best = {each: self._bounds(each)[0] for each in strategies}
        if any(best.values()):
            chart.bars(
                out / "largest.svg",
                [_label(each) for each, attempt in best.items() if attempt],
                {"parameters": [each.parameters / 1e9 for each in best.values() if each]},
                ylabel="largest model, billions of parameters",
            )


def saved(ours: Attempt, theirs: Attempt | None) -> float | None:
    """The share of their peak that ours does without; ``None`` if there is no such number."""
    if theirs is None or ours.peak.allocated is None or not theirs.peak.allocated:
        return None
    return 1 - ours.peak.allocated / theirs.peak.allocated


def _budget(memory_gib: float | None) -> int:
    """Bytes of a GPU, or as many as it may use."""
    if memory_gib is not None:
        return int(memory_gib * GIB)
    return int(torch.cuda.get_device_properties(0).total_memory)


def _label(strategy: str) -> str:
    return STRATEGIES[strategy].label


def _bar(peak: Peak) -> float | str | None:
    """None is the chart's for out of memory."""
    if peak.allocated is not None:
        return peak.allocated / GIB
    return None if peak.failure == "out of memory" else peak.failure


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    strategies = [name for name in STRATEGIES if name != "single"]
    default = [name for name in strategies if rings_of(name) == 1]
    add("--part", choices=("sizes", "largest", "both"), default="both")
    add("--strategies", nargs="+", choices=strategies, default=default, metavar="STRATEGY")
    add("--models", nargs="+", choices=models.NAMES, default=SIZES, metavar="MODEL")
    add(
        "--width", choices=models.NAMES, default="7b", metavar="MODEL", help="whose layers to stack"
    )
    add("--max-layers", type=options.positive(int), default=1024, help="default: 1024")
    add("--memory-gib", type=options.positive(float), help="per GPU; default: what it has")
    gpus = torch.cuda.device_count()
    add("--ranks", type=options.positive(int), default=gpus or 2, help="default: all GPUs")
    add("--out", type=Path, default=Path("runs/capacity"), help="default: runs/capacity")
    options.add_trial(parser)
    arguments = parser.parse_args()
    limit = arguments.memory_gib
    if gpus and arguments.ranks > gpus:
        parser.error(f"--ranks {arguments.ranks}: there are {gpus} GPUs")
    if gpus and limit is not None and limit * GIB > (total := _budget(None)):
        parser.error(f"--memory-gib {limit:g}: a GPU has {total / GIB:.1f} GiB")
    if not gpus and limit is None and arguments.part != "sizes":
        parser.error("without GPUs, --part largest needs a limit: give --memory-gib")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
