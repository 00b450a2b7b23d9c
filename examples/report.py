"""What rank 0 tells the terminal: progress while training, bytes per rank afterwards."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

try:
    from rich import progress as bar
except ImportError:  # a machine without it still trains, and prints lines
    bar = None  # type: ignore[assignment]


class Tell(Protocol):
    """Say how far training is."""

    def __call__(self, step: int, message: str) -> None: ...


@contextmanager
def progress(steps: int) -> Iterator[Tell]:
    """Show a live bar on rank 0's terminal, lines where there is none, nothing on other ranks."""
    if dist.get_rank() != 0:
        yield lambda step, message: None
    elif bar is None or not sys.stdout.isatty():
        yield lambda step, message: print(f"step {step}/{steps}  {message}", flush=True)
    else:
        columns = (
            bar.TextColumn("step {task.completed}/{task.total}"),
            bar.BarColumn(bar_width=None),
            bar.TimeRemainingColumn(),
            bar.TextColumn("{task.description}"),
        )
        with bar.Progress(*columns) as live:
            task = live.add_task("", total=steps)
            yield lambda step, message: live.update(task, completed=step, description=message)


def tell(message: str = "") -> None:
    """Print on rank 0."""
    if dist.get_rank() == 0:
        print(message, flush=True)


@dataclass(frozen=True)
class Bytes:
    """What some tensors take: on this rank, and on one that would hold all of them whole."""

    here: int
    whole: int

    @classmethod
    def of(cls, tensors: Iterable[Tensor]) -> Bytes:
        here = whole = 0
        for tensor in tensors:
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            here += local.numel() * local.element_size()
            whole += tensor.numel() * tensor.element_size()
        return cls(here, whole)

    def __add__(self, other: Bytes) -> Bytes:
        return Bytes(self.here + other.here, self.whole + other.whole)


def training_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Bytes]:
    """Count the parameters, gradients and optimizer state that live between steps."""
    parameters = list(model.parameters())
    return {
        "parameters": Bytes.of(parameters),
        "gradients": Bytes.of(p.grad for p in parameters if p.grad is not None),
        "Adam state": Bytes.of(
            value
            for state in optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        ),
    }


def table(state: dict[str, Bytes], device: torch.device) -> str:
    """Lay out `state`, the largest rank's bytes beside the unsharded model's."""
    rows = {**state, "together": sum(state.values(), Bytes(0, 0))}
    largest = torch.tensor([row.here for row in rows.values()], device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    lines = [f"{'':12}{'per rank':>14}{'unsharded':>14}{'ratio':>8}"]
    for (name, row), here in zip(rows.items(), largest.tolist(), strict=True):
        ratio = here / row.whole if row.whole else 0.0
        lines.append(f"{name:12}{size(here):>14}{size(row.whole):>14}{ratio:>8.3f}")
    return "\n".join(lines)


def size(count: int) -> str:
    """Write bytes for people, in MiB."""
    return f"{count / 2**20:,.2f} MiB"
