"""One strategy, one model, a few training steps on synthetic tokens: its times and its peak."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from harness import models
from harness.graphed import GraphedStep
from harness.hardware import this_device
from harness.memory import Memory
from harness.strategies import STRATEGIES, Setting, apply


@dataclass(frozen=True)
class Trial:
    """What to run; ``batch_size`` sequences of ``seq_len`` tokens are one rank's share of a step.

    ``changes`` are sizes of the model that differ from the named ones, such as its ``layers``.
    With ``from_start`` the peak includes preparing the model and the first step; without, it is
    that of the ``steps`` after ``warmup``. ``memory_mib`` is enforced: more is out of memory.
    """

    strategy: str
    model: str
    batch_size: int
    seq_len: int
    setting: Setting = field(default_factory=Setting)
    changes: dict[str, Any] = field(default_factory=dict)
    steps: int = 8
    warmup: int = 3
    memory_mib: float | None = None
    from_start: bool = False

    @property
    def tokens(self) -> int:
        """Per rank and step."""
        return self.batch_size * self.seq_len

    def spec(self) -> models.ModelSpec:
        return models.find(self.model, **self.changes)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Outcome:
    """One rank's: seconds of a step after the warmup, losses of all steps, bytes of its peak.

    ``staging`` are the bytes of it that rtp has for tiles in flight.
    """

    seconds: tuple[float, ...]
    losses: tuple[float, ...]
    allocated: int
    reserved: int
    staging: int | None = None


def run_trial(trial: Trial) -> Outcome:
    """Run on this rank; all ranks of the default group call it. Frees everything at the end."""
    if trial.strategy == "single" and dist.get_world_size() > 1:
        raise ValueError("the strategy 'single' runs on one rank")
    if STRATEGIES[trial.strategy].graphed and (not torch.cuda.is_available() or trial.warmup < 2):
        raise ValueError(f"{trial.strategy!r} needs GPUs, and two steps of warmup")
    if trial.setting.compile:
        # Else all trials of a process share the limit on how often a function is compiled, beyond
        # which it runs as it is.
        torch.compiler.reset()
    device = this_device()
    with Memory(device, trial.memory_mib) as memory:
        return _train(trial, device, memory)


def _train(trial: Trial, device: torch.device, memory: Memory) -> Outcome:
    strategy = STRATEGIES[trial.strategy]
    spec = trial.spec()
    model = apply(strategy, spec.build(), trial.setting, device)
    memory.see(model)
    optimizer = adamw(model, device, capturable=strategy.graphed)
    # Every rank its own batch, or all of them the same one: the batches of all.
    whose = range(dist.get_world_size()) if strategy.shares_batch else [dist.get_rank()]
    generators = [torch.Generator().manual_seed(rank) for rank in whose]
    size = (trial.batch_size, trial.seq_len + 1)
    # All at first: a copy from the host would wait for the steps before.
    batches = [
        torch.cat([torch.randint(spec.vocab, size, generator=each) for each in generators])
        for _ in range(trial.warmup + trial.steps)
    ]
    batches = [each.to(device) for each in batches]

    def step(tokens: torch.Tensor) -> torch.Tensor:
        with strategy.forward(trial.setting, device):
            logits = model(tokens[:, :-1])
        with strategy.loss():
            loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.full_tensor() if isinstance(loss, DTensor) else loss.detach()

    if strategy.graphed:
        step = GraphedStep(step, batches[0], eager=trial.warmup - 1)
    ticks = [_tick(device)]
    losses = []
    for index, tokens in enumerate(batches):
        # A captured step allocates once and for all, when it is captured.
        if index == trial.warmup and not trial.from_start and not strategy.graphed:
            memory.restart()
        losses.append(step(tokens))
        ticks.append(_tick(device))
    allocated, reserved = memory.peak()
    return Outcome(
        seconds=_intervals(ticks)[trial.warmup :],
        losses=tuple(loss.item() for loss in losses),
        allocated=allocated,
        reserved=reserved,
        staging=getattr(model, "staging_bytes", None),
    )


def adamw(
    model: nn.Module, device: torch.device, capturable: bool = False
) -> torch.optim.Optimizer:
    """The optimizer of every trial; ``capturable`` in a CUDA graph."""
    fused = device.type == "cuda"
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=fused, capturable=capturable)


def _tick(device: torch.device) -> float | torch.cuda.Event:
    """A moment; on CUDA one of the stream's, so that nothing waits for it."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _intervals(ticks: list[Any]) -> tuple[float, ...]:
    """Seconds between moments."""
    if isinstance(ticks[0], float):
        return tuple(after - before for before, after in pairwise(ticks))
    torch.cuda.synchronize()
    return tuple(before.elapsed_time(after) / 1000 for before, after in pairwise(ticks))
