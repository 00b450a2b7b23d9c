"""All strategies side by side: one model, one machine, one run.

    python benchmarks/compare.py
    python benchmarks/compare.py --model lm --precision mixed --strategies dp fsdp-root fsdp rtp

Rounds are interleaved: each has one trial of every strategy, every other round in reverse order, so
that a machine that grows warm or busy does so for all. Ratios are medians of ratios within a round.
All strategies start from the same weights and see the same tokens, so their losses must agree: one
whose losses do not is marked, and the exit code is 1.

"single" is one GPU without communication, on rank 0's part of the batch. Its process stays alive
beside those of the N ranks, and theirs beside it: while idle they hold no tensors, but each has its
CUDA context and NCCL's buffers on its GPU, some hundred MiB that --memory-gib does not count.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from harness import chart, models, options, progress, report
from harness.comparison import GIB, Comparison, Run
from harness.rounds import Crews, interleaved
from harness.strategies import STRATEGIES
from harness.trial import Trial

#: Files, and what they show.
CHARTS = {"time.svg": "ms per step", "memory.svg": "peak, GiB per rank"}
DEFAULT = ("single", "dp", "fsdp", "tp", "rtp", "rtp-inplace")


def main() -> int:
    """Run all rounds, show the table; 1 if losses disagree or anything but memory made one fail."""
    arguments = _arguments()
    comparison = Comparison(_trial(arguments), arguments.ranks, arguments.baseline)
    for name in CHARTS:
        (arguments.out / name).unlink(missing_ok=True)  # of an earlier run
    code = 0
    try:
        for _ in _runs(comparison, arguments):
            _write(comparison, arguments.out)
    except KeyboardInterrupt:
        print(f"interrupted; what was measured is in {arguments.out}", file=sys.stderr)
        code = 130
    if comparison.runs:
        report.show(comparison.table())
        _draw(comparison, arguments.out)
        _write(comparison, arguments.out)
        print(f"written to {arguments.out}")
    return code or int(not all(row.good for row in comparison.rows()))


def _runs(comparison: Comparison, arguments: argparse.Namespace) -> Iterator[Run]:
    """All rounds."""
    names, rounds = list(dict.fromkeys(arguments.strategies)), arguments.rounds
    with (
        Crews(arguments.ranks, arguments.timeout) as crews,
        progress.steps(rounds * len(names), "comparison") as advance,
    ):
        yield from interleaved(comparison, names, rounds, crews, advance)


def _write(comparison: Comparison, out: Path) -> None:
    markdown = f"# Comparison\n\n{comparison.table().markdown()}\n{comparison.notes()}"
    for name, title in CHARTS.items():
        if (out / name).exists():
            markdown += f"\n![{title}]({name})\n"
    report.write(out, "report", data=comparison.as_json(), markdown=markdown)


def _draw(comparison: Comparison, out: Path) -> None:
    rows = [row for row in comparison.rows() if row.failure in (None, "out of memory")]
    names = [row.strategy for row in rows]
    steps = {"step": [_scaled(row.seconds, 1000) for row in rows]}
    peaks = {
        "allocated": [_scaled(row.allocated, 1 / GIB) for row in rows],
        "reserved": [_scaled(row.reserved, 1 / GIB) for row in rows],
    }
    for (name, title), series in zip(CHARTS.items(), (steps, peaks), strict=True):
        chart.bars(out / name, names, series, ylabel=title)


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _trial(arguments: argparse.Namespace) -> Trial:
    return Trial(
        strategy=arguments.baseline,
        model=arguments.model,
        batch_size=arguments.batch_size,
        seq_len=arguments.seq_len,
        setting=replace(options.setting(arguments), compile=arguments.compile),
        changes={"layers": arguments.layers},
        steps=arguments.steps,
        warmup=arguments.warmup,
        memory_mib=arguments.memory_gib and arguments.memory_gib * 1024,
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, cuda = parser.add_argument, torch.cuda.is_available()
    count, number = options.positive(int), options.positive(float)
    names = f"of {', '.join(models.NAMES)}; default: %(default)s"
    model = "llama-8b-layers" if cuda else "llama-tiny"
    add("--model", choices=models.NAMES, default=model, metavar="NAME", help=names)
    add("--layers", type=count, help="default: the model's")
    names = f"of {', '.join(STRATEGIES)}; default: {' '.join(DEFAULT)}"
    add("--strategies", nargs="+", choices=STRATEGIES, default=DEFAULT, metavar="NAME", help=names)
    add("--baseline", choices=STRATEGIES, default="fsdp", help="of ratios; default: %(default)s")
    ranks = torch.cuda.device_count() or 2
    add("--ranks", type=count, default=ranks, help="default: all GPUs, or 2 on CPU")
    add("--rounds", type=count, default=5, help="trials of each strategy; default: %(default)s")
    add("--steps", type=count, default=8, help="timed ones of a trial; default: %(default)s")
    add("--warmup", type=count, default=3, help="steps before those; default: %(default)s")
    options.add_trial(parser)
    if cuda:
        parser.set_defaults(batch_size=2, seq_len=4096, precision="bf16")
    else:
        parser.set_defaults(seq_len=64)
    add("--compile", action="store_true", help="compile every block")
    add("--memory-gib", type=number, help="enforced per rank; default: what there is")
    add("--out", type=Path, default=Path("runs/compare"), help="directory; default: %(default)s")
    arguments = parser.parse_args()
    if arguments.baseline not in arguments.strategies:
        parser.error(f"--baseline {arguments.baseline} is none of --strategies: add it there")
    if cuda and arguments.ranks > ranks:
        parser.error(f"--ranks {arguments.ranks} of {ranks} GPUs: give at most {ranks}")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
