"""Weights that a forward writes before it reads them: momentum encoders, normalised weights."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))

from rtp_wrap import Gather, MixedPrecisionPolicy, Replicate, RotatedTensorParallel, ShardingPolicy
from tests.parity import check_parity, full
from tests.ranks import all_world_sizes, device, multi_world_sizes, run_ranks

POLICIES: tuple[Any, ...] = (
    ShardingPolicy(replicate_below=0),
    {"*": Gather()},
    {"*": Replicate()},
)


class Encoder(nn.Module):
    """Large parameters and small ones, of its own and of modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(6, 8), nn.LayerNorm(8)
        self.weight = nn.Parameter(torch.randn(8, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.first(x).tanh()) @ self.weight


class Momentum(nn.Module):
    """The key encoder follows the query encoder, in the middle of a forward that has read both."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = Encoder(), Encoder().requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before, query = self.key(x), self.query(x)
        with torch.no_grad():
            pairs = zip(self.key.parameters(), self.query.parameters(), strict=True)
            for key, value in pairs:
                key.lerp_(value, 0.5)
        return before - query * self.key(x)


def _batch(step: int, rank: int) -> tuple[torch.Tensor]:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return (torch.randn(4, 6, generator=generator, dtype=torch.float64),)


def _momentum() -> None:
    for policy in POLICIES:
        check_parity(Momentum, _batch, policy=policy)


@all_world_sizes
def test_a_momentum_encoder_follows_within_a_forward(world_size: int) -> None:
    run_ranks(world_size, _momentum)


class Uncounted(nn.Module):
    """Writes that torch does not count, with gradients switched off, and then reads."""

    def __init__(self, every: int) -> None:
        super().__init__()
        self.query, self.key = self._layers(), self._layers().requires_grad_(False)
        self.every, self.calls = every, 0

    @staticmethod
    def _layers() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        query = self.query(x)
        if self.calls % self.every:
            return query - self.key(x)
        with torch.no_grad():
            keys, queries = list(self.key.parameters()), list(self.query.parameters())
            keys[0].data.mul_(0.5).add_(queries[0].data, alpha=0.5)
            torch._foreach_lerp_(keys[1:], queries[1:], 0.5)
            return query - self.key(x)


def _uncounted() -> None:
    """In each step or in every other one, when it was seen to go on without."""
    (x,) = _batch(0, dist.get_rank())
    x = x.to(device())
    for transport in ("ring", "peer"):
        policy = ShardingPolicy(replicate_below=0, transport=transport)
        for every in (1, 2):
            torch.manual_seed(0)
            dense = Uncounted(every).to(device(), torch.float64)
            wrapped = RotatedTensorParallel(deepcopy(dense), policy=policy)
            for step in range(4):
                torch.testing.assert_close(wrapped(x), dense(x), msg=f"{transport} {every} {step}")


@multi_world_sizes
def test_uncounted_writes_with_gradients_off_are_seen(world_size: int) -> None:
    run_ranks(world_size, _uncounted)


def _momentum_in_bf16() -> None:
    """What is cast is a copy: one of before the write is far off, not by a rounding error."""
    (x,) = _batch(0, dist.get_rank())
    x = x.to(device(), torch.float32)
    torch.manual_seed(0)
    dense = Momentum().to(device())
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)
    for policy in POLICIES:
        for grad in (True, False):
            theirs = deepcopy(dense)
            ours = RotatedTensorParallel(deepcopy(dense), policy=policy, mixed_precision=precision)
            with torch.set_grad_enabled(grad):
                expected, output = theirs(x), ours(x)
            error = (output - expected).norm() / expected.norm()
            assert error < 0.03, (policy, grad, error)


@all_world_sizes
def test_so_it_does_in_another_dtype(world_size: int) -> None:
    run_ranks(world_size, _momentum_in_bf16)


class Doubles(nn.Module):
    """Writes a parameter of its own between two reads of it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(5, 4), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before = x @ self.weight
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.mul_(2)
        return x @ self.weight / before


def _doubles() -> None:
    for policy in POLICIES[1:]:
        for dtype in (None, torch.bfloat16):
            wrapped = RotatedTensorParallel(
                Doubles().to(device()),
                policy=policy,
                mixed_precision=MixedPrecisionPolicy(param_dtype=dtype),
            )
            ratio = wrapped(torch.ones(3, 5, device=device()))
            assert (ratio == 2).all(), (policy, dtype)
            assert (full(wrapped.weight) == 2).all()


@all_world_sizes
def test_a_module_may_write_its_own_parameter(world_size: int) -> None:
    run_ranks(world_size, _doubles)


class Normalises(nn.Module):
    """A trained weight is normalised before it is used, but after others were."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.prototypes = nn.LayerNorm(6), nn.Linear(6, 5, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        with torch.no_grad():
            (weight,) = self.prototypes.parameters()
            norm: Any = weight.norm()
            weight.div_(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        return self.prototypes(x)


def _normalises() -> None:
    for policy in POLICIES:
        check_parity(Normalises, _batch, policy=policy)


@all_world_sizes
def test_a_trained_weight_may_be_written_before_it_is_used(world_size: int) -> None:
    run_ranks(world_size, _normalises)


class Counts(nn.Module):
    """Writes a parameter by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.count = nn.Parameter(torch.ones(4), requires_grad=False)
        self.shift = nn.Parameter(torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.count.mul_(0.5)
        return x * self.count + self.shift


def _counts() -> None:
    """A replicated parameter reads as itself, in its own dtype; a copy would lose the write."""
    x = torch.ones(2, 4, device=device())
    wrapped = RotatedTensorParallel(Counts().to(device()))
    for turn in (1, 2):
        assert (wrapped(x) == 0.5**turn).all()
    assert (full(wrapped.get_parameter("count")) == 0.25).all()
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for policy, copy in ((None, r"copy in torch\.bfloat16"), ({"*": Gather()}, "gathered copy")):
        cast = RotatedTensorParallel(
            Counts().to(device()), policy=policy, mixed_precision=precision
        )
        for grad in (True, False):
            with (
                torch.set_grad_enabled(grad),
                pytest.raises(RuntimeError, match=rf"count was written to .* {copy}"),
            ):
                cast(x)


@all_world_sizes
def test_a_write_to_a_copy_is_an_error(world_size: int) -> None:
    run_ranks(world_size, _counts)
