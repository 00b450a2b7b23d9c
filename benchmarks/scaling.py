"""The same step on 1, 2, 4, … ranks measured, and on up to 1024 ranks predicted.

    python benchmarks/scaling.py --ranks 1 2 4
    python benchmarks/scaling.py --predict-only runs/scaling/scaling.json --network-gbps 200

Every rank has the same batch at any N, so that efficiency is tokens/s per rank against those of one
rank. "rtp" pulls tiles from peers where it can, "rtp-ring" sends them by hops. The predictions are
the formulas in harness/communication.py and harness/pulling.py. What they go by is measured in the
same run: pulls, hops and all-gathers by size, products beside them, the step on one rank, plain and
of rtp_wrap, and its optimizer. They do not see the steps at N > 1: those are their test, and the
table has the error of each. Beyond one node they go by --network-gbps and --network-latency-us,
which are assumptions.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from harness import compute, link, progress, report
from harness.communication import Network
from harness.crew import Crew, TrialError
from harness.models import NAMES
from harness.options import positive
from harness.strategies import PRECISIONS, Setting
from harness.study import Study
from harness.trial import Trial, run_trial
from rtp_wrap.transport.choice import VARIABLE

CUDA = torch.cuda.is_available()
#: Bytes of the hops and all-gathers that a link's latency and rate are fitted to: those of tiles.
SIZES = [1 << power for power in (range(16, 27, 2) if CUDA else range(10, 19, 2))]
#: Bytes of the hop beside which products are measured.
BESIDE = 1 << (24 if CUDA else 18)
#: Options that are about measuring alone.
MEASURING = (
    *("model", "layers", "batch_size", "seq_len", "precision", "ranks", "strategies"),
    *("rounds", "steps", "warmup", "timeout"),
)


def main() -> int:
    """Measure or read, predict, write."""
    parser = _parser()
    options = parser.parse_args()
    network = Network(options.gpus_per_node, options.network_gbps, options.network_latency_us / 1e6)
    if options.predict_only is not None:
        for name in MEASURING:
            if getattr(options, name) != parser.get_default(name):
                flag = name.replace("_", "-")
                parser.error(f"--predict-only measures nothing: leave out --{flag}")
        try:
            study = Study.read(options.predict_only)
        except ValueError as error:
            parser.error(str(error))
        tables = study.publish(options.out, network, options.predict)
    else:
        ranks = _ranks(parser, options.ranks)
        changes = {} if options.layers is None else {"layers": options.layers}
        study = Study(
            Trial(
                "single",
                options.model,
                options.batch_size,
                options.seq_len,
                Setting(options.precision),
                changes,
                options.steps,
                options.warmup,
            )
        )
        try:
            for _ in _measure(study, ranks, options):
                tables = study.publish(options.out, network, options.predict)
        except KeyboardInterrupt:
            done = len(study.runs)
            print(f"interrupted after {done} runs, which are in {options.out}", file=sys.stderr)
            return 130
    for table in tables:
        report.show(table)
    return 0


def _measure(study: Study, ranks: Sequence[int], options: argparse.Namespace) -> Iterator[None]:
    """Calibrate, then run all numbers of ranks in turn; yields when there is something new."""
    # A rank gets as many threads at any N, or on a CPU the step would not be the same.
    threads = max(1, (os.cpu_count() or 1) // ranks[-1])
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    os.environ.setdefault(VARIABLE, "peer")  # where that is possible, on CPUs as well
    kinds = [("single", 1), ("rtp", 1)]
    kinds += [(name, n) for n in ranks[1:] for name in options.strategies]
    with ExitStack() as stack:
        crews = {n: stack.enter_context(Crew(n, options.timeout)) for n in ranks}
        total = 2 + options.rounds * len(kinds)
        advance = stack.enter_context(progress.steps(total, "scaling"))
        try:
            study.calibration = _calibrate(study.trial, crews, options.predict, advance)
        except TrialError as error:
            print(f"nothing can be predicted: {error}", file=sys.stderr)
        for turn in range(options.rounds):
            for strategy, n in list(kinds):
                run: dict[str, Any] = {"strategy": strategy, "ranks": n, "round": turn}
                try:
                    outcomes = crews[n].run(run_trial, replace(study.trial, strategy=strategy))
                    steps = zip(*(each.seconds for each in outcomes), strict=True)
                    run["seconds"] = [max(step) for step in steps]
                except TrialError as error:
                    print(error, file=sys.stderr)
                    run["failure"] = error.kind
                    kinds.remove((strategy, n))  # it would fail again
                study.runs.append(run)
                advance(f"{strategy} on {n}, round {turn + 1}")
                yield


def _calibrate(
    trial: Trial, crews: dict[int, Crew], counts: Sequence[int], advance: Callable[[str], None]
) -> dict[str, Any]:
    """What a ``Study`` needs besides runs; of several ranks the slowest one's."""
    spec, alone, most = trial.spec(), crews[1], max(crews)
    dtype = trial.setting.compute_dtype
    ring = crews[most]
    beside = trial.tokens, spec.dim, dtype
    measured = {
        "hops": _by_size(ring.run(link.hops, SIZES)),
        "gathers": _by_size(ring.run(link.gathers, SIZES)),
        "beside": _slowest(ring.run(link.beside_hop, BESIDE, *beside)),
    }
    pulls = ring.run(link.pulls, SIZES)
    if None not in pulls:
        measured["pulls"] = _by_size(pulls)
        measured["beside a pull"] = _slowest(ring.run(link.beside_pull, BESIDE, *beside))
        measured["copied"] = SIZES[-1], max(ring.run(link.copies, SIZES[-1]))
    advance(f"link, on {most}")
    (optimizer,) = alone.run(compute.optimizer_seconds, trial)
    narrow = max(1, spec.dim // max(counts))
    (floor,) = alone.run(compute.floor_seconds, trial.tokens, spec.dim, narrow, dtype)
    advance("optimizer, on 1")
    return {
        "ranks": most,
        "optimizer": optimizer,
        "floor": floor,
        **measured,
    }


def _by_size(ranks: Sequence[Any]) -> Any:
    """(bytes, seconds) for each of ``SIZES``, of what each rank measured."""
    return list(zip(SIZES, map(max, zip(*ranks, strict=True)), strict=True))


def _slowest(ranks: Sequence[tuple[float, ...]]) -> Any:
    """The rank on which both took longest."""
    return max(ranks, key=lambda each: each[-1])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, count, number = parser.add_argument, positive(int), positive(float)
    default = "llama-8b-layers" if CUDA else "llama-tiny"
    add("--model", choices=NAMES, metavar="NAME", default=default, help=f"of {', '.join(NAMES)}")
    add("--layers", type=count, help="default: the model's")
    add("--batch-size", type=count, default=2, help="sequences per rank; default: 2")
    add("--seq-len", type=count, default=4096 if CUDA else 64, help="default: %(default)s")
    precision = "bf16" if CUDA else "fp32"
    add("--precision", choices=PRECISIONS, default=precision, help="default: %(default)s")
    add(
        "--ranks",
        type=count,
        nargs="+",
        help="default: powers of two up to all GPUs, or 1 2",
    )
    add(
        "--strategies",
        choices=("rtp", "rtp-ring", "fsdp", "dp"),
        nargs="+",
        default=["rtp", "rtp-ring"],
        help="default: rtp rtp-ring",
    )
    add(
        "--rounds",
        type=count,
        default=3,
        help="of all numbers of ranks in turn; default: 3",
    )
    add("--steps", type=count, default=8, help="timed ones of a round; default: 8")
    add("--warmup", type=count, default=3, help="steps before those; default: 3")
    add("--timeout", type=number, default=600.0, help="seconds of a round; default: 600")
    add("--predict-only", type=Path, metavar="JSON", help="of an earlier run: measure nothing")
    counts = [2**power for power in range(11)]
    add(
        "--predict",
        type=count,
        nargs="+",
        default=counts,
        help="ranks; default: 1 2 … 1024",
    )
    add("--gpus-per-node", type=count, default=8, help="default: 8")
    network = "Gbit/s per GPU between nodes; default: 400, an NDR InfiniBand port for each"
    add("--network-gbps", type=number, default=400.0, help=network)
    latency = (
        "of a hop between nodes, added to that of a hop in one; default: 14, which NCCL assumes "
        "for a step of its ring (hwLat[NET][Ring][Simple] in its src/graph/tuning.cc)"
    )
    add("--network-latency-us", type=number, default=14.0, help=latency)
    out = Path("runs/scaling")
    add("--out", type=Path, default=out, help="directory of the results; default: %(default)s")
    return parser


def _ranks(parser: argparse.ArgumentParser, given: list[int] | None) -> list[int]:
    """In order, with the one that the others are compared with."""
    most = torch.cuda.device_count() if CUDA else 2
    ranks = sorted({1, *(given or [n for n in (2**p for p in range(11)) if n <= most])})
    if CUDA and ranks[-1] > most:
        parser.error(f"--ranks {ranks[-1]} of {most} GPUs: give at most {most}")
    if len(ranks) == 1:
        parser.error("one rank has no link to measure: give --ranks 1 2, or --predict-only JSON")
    return ranks


if __name__ == "__main__":
    sys.exit(main())
