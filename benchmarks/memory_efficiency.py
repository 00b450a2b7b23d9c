"""Memory efficiency: the peak of one GPU on the batch of all ÷ (N × the peak of each of N GPUs).

    python benchmarks/memory_efficiency.py --models gpt2-large neo-1.3b --ranks 2 4

1 would be a model and batch cut into N with nothing besides; 0.99 is the aim at 1B parameters and
up. "beyond 1/N" is what a GPU holds besides its part of the single GPU's peak: staging, whose size
is fixed and shown beside it, what is replicated, and buffers that no sharding cuts.

Peaks are of what tensors took in two AdamW steps after the first, on the rank that needed most. On
CPU they are resident memory: that is for trying the script. Where the batch of all does not fit one
GPU there is no efficiency.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from harness import models, options, progress, report
from harness.crew import Crew
from harness.peak import CAVEAT, Peak, billions, measure
from harness.strategies import STRATEGIES
from harness.trial import Trial

MIB = 2**20
NOT_YET = Peak(failure="not measured")


def main() -> int:
    arguments = _arguments()
    rows: list[Row] = []
    total = len(arguments.models) * len(arguments.ranks) * (1 + len(arguments.strategies))
    try:
        with progress.steps(total, "memory efficiency") as advance:
            for message in _measure(arguments, rows):
                _write(arguments, rows)
                advance(message)
    except KeyboardInterrupt:
        print(f"interrupted; what was measured is in {arguments.out}", file=sys.stderr)
        return 130
    report.show(_table(rows))
    print(f"written to {arguments.out}")
    return 0


@dataclass
class Row:
    """``strategy`` on ``ranks``, and before that one rank with the batches of all."""

    model: str
    parameters: int
    ranks: int
    strategy: str
    single: Peak
    peak: Peak = NOT_YET

    @property
    def efficiency(self) -> float | None:
        """``None`` if one of the peaks is not known."""
        if not self.single.allocated or not self.peak.allocated:
            return None
        return self.single.allocated / (self.ranks * self.peak.allocated)

    @property
    def beyond(self) -> float | None:
        """Bytes of a rank's peak that are more than its part of the single rank's."""
        if not self.single.allocated or not self.peak.allocated:
            return None
        return self.peak.allocated - self.single.allocated / self.ranks


def _measure(arguments: argparse.Namespace, rows: list[Row]) -> Iterator[str]:
    """Add to ``rows``; yields what was measured, trial by trial."""

    def run(crew: Crew, strategy: str, name: str, batch_size: int) -> Peak:
        setting = options.setting(arguments)
        trial = Trial(strategy, name, batch_size, arguments.seq_len, setting, steps=2, warmup=1)
        return measure(crew, trial)

    with Crew(1, arguments.timeout) as crew:
        for ranks in arguments.ranks:
            for name in arguments.models:
                single = run(crew, "single", name, ranks * arguments.batch_size)
                count = models.find(name).parameters()
                rows += [Row(name, count, ranks, each, single) for each in arguments.strategies]
                yield f"{name}, one rank with {ranks} batches: {single.sentence()}"
    for ranks in arguments.ranks:
        with Crew(ranks, arguments.timeout) as crew:
            for row in rows:
                if row.ranks == ranks:
                    row.peak = run(crew, row.strategy, row.model, arguments.batch_size)
                    yield f"{row.model}, {ranks} ranks, {row.strategy}: {row.peak.sentence()}"


def _table(rows: list[Row]) -> report.Table:
    columns = (
        *("model", "parameters", "N", "strategy", "one GPU, GiB", "of N, GiB each"),
        *("efficiency", "beyond 1/N, MiB", "staging, MiB"),
    )
    table = report.Table("Memory efficiency", columns)
    for row in rows:
        table.add(
            row.model,
            billions(row.parameters),
            str(row.ranks),
            STRATEGIES[row.strategy].label,
            str(row.single),
            str(row.peak),
            None if row.efficiency is None else f"{row.efficiency:.2%}",
            None if row.beyond is None else f"{row.beyond / MIB:.1f}",
            None if row.peak.staging is None else f"{row.peak.staging / MIB:.1f}",
        )
    return table


def _write(arguments: argparse.Namespace, rows: list[Row]) -> None:
    derived = [{"efficiency": row.efficiency, "beyond": row.beyond} for row in rows]
    data = [{**asdict(row), **more} for row, more in zip(rows, derived, strict=True)]
    markdown = f"{options.describe(arguments)}. {CAVEAT}\n\n{_table(rows).markdown()}"
    reasons = {
        f"- {peak.reason}\n" for row in rows for peak in (row.single, row.peak) if peak.reason
    }
    if reasons:
        markdown += "\n" + "".join(sorted(reasons))
    report.write(arguments.out, "memory_efficiency", data=data, markdown=markdown)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    gpus = torch.cuda.device_count()
    powers = [2**power for power in range(1, gpus.bit_length())] if gpus else [2]
    names, ours = ["gpt2-large", "neo-1.3b"], ["rtp", "rtp-inplace"]
    sharded = [name for name in STRATEGIES if name != "single"]
    add("--models", nargs="+", choices=models.NAMES, default=names, metavar="MODEL")
    add("--ranks", nargs="+", type=options.positive(int), default=powers, help="every N")
    add("--strategies", nargs="+", choices=sharded, default=ours, metavar="STRATEGY")
    add("--out", type=Path, default=Path("runs/memory_efficiency"))
    options.add_trial(parser)
    arguments = parser.parse_args()
    if not arguments.ranks:
        parser.error("there is one GPU: N of at least 2 need as many")
    if gpus and max(arguments.ranks) > gpus:
        parser.error(f"--ranks {max(arguments.ranks)}: there are {gpus} GPUs")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
