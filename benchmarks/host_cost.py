"""What the host does for a step, where devices have next to nothing to do.

    torchrun --nproc_per_node=4 benchmarks/host_cost.py

Small batches are bound by the host: it enqueues a product and its transfers more slowly than the
GPU executes them. Here layers are so small that all of a step is like that. The first table is the
milliseconds of forward, backward and optimizer by strategy, medians on the slowest rank; ranks wait
for each other, so that is what the slowest host takes. The second one has rtp_wrap's own functions:
how often they are called in a step, and what a call takes on rank 0, with what it calls. Timing
them slows them down, by some tenths of a microsecond a call, so the first table is without.
"""

from __future__ import annotations

import argparse
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.nn import functional as F

from harness import models, report
from harness.hardware import this_device
from harness.strategies import STRATEGIES, Setting, apply
from harness.trial import adamw
from rtp_wrap.modules import linear as modules_linear
from rtp_wrap.ops import gradient, linear, pull
from rtp_wrap.ring import Ring
from rtp_wrap.transport import peer
from rtp_wrap.transport.lane import Lane
from rtp_wrap.transport.peer import PeerTransport
from rtp_wrap.transport.shared import SharedMemory
from rtp_wrap.transport.symmetric import SymmetricMemory

PARTS = ("forward", "backward", "optimizer")
SITES = 7  # of a block
#: What is timed, from the outside in.
TIMED: tuple[tuple[Any, str], ...] = (
    (modules_linear, "rotated_linear"),
    (gradient, "token_of"),
    (linear, "linear_forward"),
    (linear, "linear_backward"),
    (Ring, "begin"),
    (pull, "forward"),
    (pull, "backward"),
    (PeerTransport, "pull"),
    (PeerTransport, "_fetch"),
    (PeerTransport, "parts"),
    (PeerTransport, "average"),
    (PeerTransport, "averaged"),
    (PeerTransport, "_exchange"),
    (peer, "put_mean"),
    (Lane, "meet"),
    (SymmetricMemory, "barrier"),
    (SymmetricMemory, "copy"),
    (SharedMemory, "barrier"),
    (SharedMemory, "copy"),
    (torch.cuda.Event, "record"),
    (torch.cuda.Stream, "wait_event"),
)


class Timers:
    """Seconds and calls by function, of all threads: backward has one of its own on GPUs."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)

    @contextmanager
    def running(self) -> Iterator[None]:
        with ExitStack() as stack:
            for owner, name in TIMED:
                label = f"{owner.__name__.rpartition('.')[2]}.{name}"
                timed = self._timed(label, getattr(owner, name))
                stack.enter_context(patch.object(owner, name, timed))
            yield

    def _timed(self, label: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[label] += time.perf_counter() - begun
                self.calls[label] += 1

        return call


class Training:
    """A strategy's model, and the host's time for parts of its steps."""

    def __init__(self, strategy: str, layers: int) -> None:
        self._device = this_device()
        spec = models.find("llama-tiny", layers=layers, dim=256, ffn=512)
        dtype = "bf16" if self._device.type == "cuda" else "fp32"
        self._model = apply(STRATEGIES[strategy], spec.build(), Setting(dtype), self._device)
        self._optimizer = adamw(self._model, self._device)
        self._tokens = torch.randint(spec.vocab, (1, 65), device=self._device)

    def step(self) -> tuple[float, ...]:
        """Seconds of its ``PARTS``; the device is idle before, and not waited for within."""
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        times = [time.perf_counter()]
        logits = self._model(self._tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), self._tokens[0, 1:])
        times.append(time.perf_counter())
        loss.backward()
        times.append(time.perf_counter())
        self._optimizer.step()
        self._optimizer.zero_grad()
        times.append(time.perf_counter())
        return tuple(after - before for before, after in pairwise(times))

    def milliseconds(self, steps: int) -> list[float]:
        """The medians, of the rank that takes longest."""
        measured = [self.step() for _ in range(steps)]
        medians = torch.tensor([1e3 * median(column) for column in zip(*measured, strict=True)])
        medians = medians.to(self._device)
        dist.all_reduce(medians, op=dist.ReduceOp.MAX)
        return list(medians.tolist())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    names = ("single", "fsdp", "rtp")
    add("--strategies", nargs="+", choices=STRATEGIES, default=names, metavar="NAME")
    add("--layers", type=int, default=8)
    add("--steps", type=int, default=30)
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        torch.set_num_threads(1)
    device = this_device() if cuda else None
    dist.init_process_group("nccl" if cuda else "gloo", device_id=device)
    sites = arguments.layers * SITES + 1
    table = report.Table(
        f"The host's ms, {arguments.layers} blocks of {SITES} linears and a head",
        ("strategy", *PARTS, "together", "µs per linear"),
    )
    timers = Timers()
    for name in arguments.strategies:
        training = Training(name, arguments.layers)
        training.milliseconds(10)  # what is slow at first
        parts = training.milliseconds(arguments.steps)
        per_site = 1e3 * (parts[0] + parts[1]) / sites
        table.add(name, *[f"{each:.2f}" for each in (*parts, sum(parts))], f"{per_site:.0f}")
        if name == "rtp":
            with timers.running():
                training.milliseconds(arguments.steps)
        del training
        dist.barrier()
    if dist.get_rank() == 0:
        report.show(table)
        report.show(functions(timers, arguments.steps))
    dist.destroy_process_group()


def functions(timers: Timers, steps: int) -> report.Table:
    table = report.Table(
        "rtp_wrap's functions", ("function", "calls per step", "µs per call", "ms per step")
    )
    for label, calls in timers.calls.items():
        seconds = timers.seconds[label]
        per_call = f"{1e6 * seconds / calls:.1f}"
        table.add(label, f"{calls / steps:.1f}", per_call, f"{1e3 * seconds / steps:.2f}")
    return table


if __name__ == "__main__":
    main()
