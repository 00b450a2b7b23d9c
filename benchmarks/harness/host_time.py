"""What the host takes for the parts of a step, and for rtp_wrap's functions in it."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.nn import functional as F

from harness import models
from harness.hardware import this_device
from harness.strategies import STRATEGIES, Setting, apply
from harness.trial import adamw
from rtp_wrap.modules import linear as modules_linear
from rtp_wrap.ops import linear, pull
from rtp_wrap.ring import Ring
from rtp_wrap.transport import peer
from rtp_wrap.transport.lane import Lane
from rtp_wrap.transport.peer import PeerTransport
from rtp_wrap.transport.shared import SharedMemory
from rtp_wrap.transport.symmetric import SymmetricMemory

PARTS = ("forward", "backward", "optimizer")
#: What is timed, from the outside in.
TIMED: tuple[tuple[Any, str], ...] = (
    (modules_linear, "rotated_linear"),
    (linear, "deliver"),
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
    (torch.cuda.Event, "wait"),
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


@dataclass(frozen=True)
class HostTime:
    """One rank's: milliseconds of ``PARTS``, medians, and of ``timed_steps`` the timers."""

    parts: list[float]
    timed_steps: int
    seconds: dict[str, float]
    calls: dict[str, int]


def measure(strategy: str, layers: int, steps: int) -> HostTime:
    """On all ranks of the default group together; the timers run in other steps than the parts."""
    training = _Training(strategy, layers)
    training.milliseconds(10)  # what is slow at first
    dist.barrier()
    parts, timers = training.milliseconds(steps), Timers()
    with timers.running():
        training.milliseconds(steps)
    return HostTime(parts, steps, dict(timers.seconds), dict(timers.calls))


class _Training:
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
        """The medians of the parts of so many steps."""
        measured = [self.step() for _ in range(steps)]
        return [1e3 * median(column) for column in zip(*measured, strict=True)]
