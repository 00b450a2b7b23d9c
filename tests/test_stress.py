"""Ranks and streams that are late at random places compute what they compute otherwise.

Nothing but barriers and events orders what peers write and read. A missing one is rarely seen where
all are equally fast, so here some are not, and the results must be the same bit for bit. On CPUs it
is the host that sleeps, on GPUs each stream by itself, while the host runs ahead.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn

from rtp_wrap import Gather, RotatedTensorParallel, ShardingPolicy
from rtp_wrap.transport.peer import PeerTransport
from rtp_wrap.transport.shared import SharedMemory
from rtp_wrap.transport.symmetric import SymmetricMemory
from tests.ranks import DEVICE_TYPE, THOROUGH, WORLD_SIZES, device, run_ranks

ON_GPU = DEVICE_TYPE == "cuda"
STEPS = 500 if ON_GPU else 30
#: Features are multiples of it: on a GPU products and copies are to take a while.
WIDTH = 128 if ON_GPU else 8
#: Of the places where a delay may be, those that have one.
SHARE = 0.04 if ON_GPU else 0.2
#: The longest delay. On a GPU it is about a millisecond, some layers of the model.
SECONDS, CYCLES = 0.5e-3, 2_000_000


class Model(nn.Module):
    """Rotated layers of several sizes, one used twice in every other step, and a gathered one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2 * WIDTH, 5 * WIDTH)
        self.twice = nn.Linear(5 * WIDTH, 5 * WIDTH)
        self.gathered = nn.Linear(5 * WIDTH, 3 * WIDTH)
        self.last = nn.Linear(3 * WIDTH, 2 * WIDTH, bias=False)

    def forward(self, x: torch.Tensor, again: bool) -> torch.Tensor:
        x = self.twice(self.first(x).tanh()).tanh()
        if again:
            x = self.twice(x).tanh()
        return self.last(self.gathered(x).tanh())


class Delays:
    """Sleeps that are drawn from a seed, each at its share of the places."""

    def __init__(self, seed: int, share: float) -> None:
        self._draw, self._share = random.Random(seed), share
        self.count = 0

    def maybe(self, stream: torch.cuda.Stream | None = None) -> None:
        """Perhaps one, of the host, or of the work on ``stream`` (default: the current one)."""
        if self._draw.random() >= self._share:
            return
        self.count += 1
        if not ON_GPU:
            time.sleep(self._draw.uniform(0, SECONDS))
            return
        with torch.cuda.stream(stream):
            torch.cuda._sleep(self._draw.randrange(CYCLES))

    @contextmanager
    def everywhere(self) -> Iterator[None]:
        """Around barriers and pulls on their streams, and wherever the computation meets them."""
        memory = SymmetricMemory if ON_GPU else SharedMemory
        with ExitStack() as stack:
            for name in ("barrier", "copy"):
                stack.enter_context(patch.object(memory, name, self._lane(memory, name)))
            for name in ("pull", "parts", "average"):
                stack.enter_context(patch.object(PeerTransport, name, self._computation(name)))
            yield

    def _lane(self, memory: type, name: str) -> Any:
        original = getattr(memory, name)

        def late(memory: Any, *args: Any) -> Any:
            streams = [each for each in args if isinstance(each, torch.cuda.Stream)]
            self.maybe(*streams)
            result = original(memory, *args)
            self.maybe(*streams)
            return result

        return late

    def _computation(self, name: str) -> Any:
        original = getattr(PeerTransport, name)

        def late(transport: PeerTransport, *args: Any) -> Any:
            self.maybe()
            self.maybe(transport.gradient_stream)
            result = original(transport, *args)
            self.maybe()
            return result

        return late


def _train(model: RotatedTensorParallel) -> list[torch.Tensor]:
    """Losses, in training and beside it, and in the end this rank's weights."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(dist.get_rank())
    # On the device before the first step: a copy would wait for the steps before it.
    batches = [torch.randn(4, 2 * WIDTH, generator=generator).to(device()) for _ in range(64)]
    losses = []
    for step in range(STEPS):
        x, again = batches[step % len(batches)], step % 2 == 0
        loss = nn.functional.mse_loss(model(x, again), x.roll(1, dims=1))
        if again:  # gradients that come from elsewhere, and are added to those of the layers
            loss = loss + 1e-4 * _penalty(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        if step % 5 == 0:
            with torch.no_grad():
                losses.append(model(x, again).square().mean())
    weights = [each.detach() for each in model.parameters()]
    return [torch.stack(losses), *(getattr(each, "_local_tensor", each) for each in weights)]


def _penalty(model: nn.Module) -> torch.Tensor:
    squares: list[Any] = [each.square().sum() for each in model.parameters() if each.dim() > 1]
    return torch.stack([each.full_tensor() for each in squares]).sum()


def _check(staging_bytes: int | None, inplace: bool, share: float) -> int:
    """Two trainings, of which the second one has delays: how many."""
    torch.manual_seed(0)
    original = Model().to(device())
    policy = ShardingPolicy(
        rules={"gathered": Gather()},
        replicate_below=6 * WIDTH,
        transport="peer",
        staging_bytes=staging_bytes,
    )
    delays = Delays(dist.get_rank(), share)
    results = []
    for late in (False, True):
        model = RotatedTensorParallel(deepcopy(original), policy=policy, inplace=inplace)
        with delays.everywhere() if late else ExitStack():
            results.append(_train(model))
    assert all(each.isfinite().all() for each in results[0])
    for late, punctual in zip(*reversed(results), strict=True):
        torch.testing.assert_close(late, punctual, rtol=0, atol=0)
    return delays.count


#: Seven slots for four tiles of 32 KiB each on a GPU, of 512 bytes else: a layer is several cells.
SMALL = 7 * 4 * (32768 if ON_GPU else 512)
CASES = {
    "whole": (None, False, SHARE),
    "cut": (SMALL, False, SHARE / 4),  # of more places
    "in place": (None, True, SHARE),
}
SIZES = [size for size in WORLD_SIZES if size > 1]
#: One size for each, as sleeping takes its time; with fewer GPUs some have the same.
PAIRS = [
    (size, case)
    for index, case in enumerate(CASES)
    for size in (SIZES if THOROUGH or not SIZES else [SIZES[index % len(SIZES)]])
]


@pytest.mark.parametrize(("world_size", "case"), PAIRS)
def test_who_is_late_changes_nothing(world_size: int, case: str) -> None:
    for count in run_ranks(world_size, _check, *CASES[case], timeout=240):
        assert count > STEPS
