"""What the host does for a step, where devices have next to nothing to do.

    python benchmarks/host_cost.py

Small batches are bound by the host: it enqueues a product and its transfers more slowly than the
GPU executes them. Here layers are so small that all of a step is like that. The first table is the
milliseconds of forward, backward and optimizer by strategy, medians on the slowest rank; ranks wait
for each other, so that is what the slowest host takes. They do not in forward, which is there for
the quickest rank, too: cores of one machine can be unequal. The second table has rtp_wrap's own
functions: how often they are called in a step, and what a call takes on rank 0, with what it calls.
Timing them slows them down, by some tenths of a microsecond a call, so the first one is without.
"""

from __future__ import annotations

import argparse

import torch

from harness import host_time, report
from harness.crew import Crew
from harness.host_time import PARTS, HostTime
from harness.options import positive
from harness.strategies import STRATEGIES

SITES = 7  # of a block


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, count = parser.add_argument, positive(int)
    names = ("single", "fsdp", "rtp")
    add("--strategies", nargs="+", choices=STRATEGIES, default=names, metavar="NAME")
    add("--ranks", type=count, default=torch.cuda.device_count() or 2, help="default: all GPUs")
    add("--layers", type=count, default=8)
    add("--steps", type=count, default=30)
    arguments = parser.parse_args()
    sites = arguments.layers * SITES + 1
    table = report.Table(
        f"The host's ms, {arguments.layers} blocks of {SITES} linears and a head",
        ("strategy", *PARTS, "together", "µs per linear", "forward, quickest rank"),
    )
    tables = [table]
    with Crew(arguments.ranks) as crew:
        for name in arguments.strategies:
            times = crew.run(host_time.measure, name, arguments.layers, arguments.steps)
            parts = [max(each) for each in zip(*(rank.parts for rank in times), strict=True)]
            per_site = 1e3 * (parts[0] + parts[1]) / sites
            quickest = min(rank.parts[0] for rank in times)
            milliseconds = [f"{each:.2f}" for each in (*parts, sum(parts))]
            table.add(name, *milliseconds, f"{per_site:.0f}", f"{quickest:.2f}")
            if name == "rtp":
                tables.append(functions(times[0]))
    for each in tables:
        report.show(each)


def functions(rank: HostTime) -> report.Table:
    """What is timed, as one rank called it."""
    table = report.Table(
        "rtp_wrap's functions", ("function", "calls per step", "µs per call", "ms per step")
    )
    for label, calls in rank.calls.items():
        seconds, steps = rank.seconds[label], rank.timed_steps
        per_call = f"{1e6 * seconds / calls:.1f}"
        table.add(label, f"{calls / steps:.1f}", per_call, f"{1e3 * seconds / steps:.2f}")
    return table


if __name__ == "__main__":
    main()
