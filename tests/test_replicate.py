"""Replicated parameters: one node, one collective, the average."""

from __future__ import annotations

from copy import deepcopy
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Replicate as ReplicatePlacement

if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))

import rtp_wrap.replicate
from rtp_wrap import Replicate, RotatedTensorParallel
from tests.parity import compare_gradients, mean_square
from tests.ranks import all_world_sizes, device, multi_world_sizes, run_ranks

REPLICATED = {"*": Replicate()}


def _layers() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)]
    return nn.Sequential(*layers).to(device(), torch.float64)


def _inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """The whole batch, and this rank's part."""
    generator = torch.Generator().manual_seed(1)
    whole = torch.randn(3 * dist.get_world_size(), 4, generator=generator, dtype=torch.float64)
    whole = whole.to(device())
    return whole, whole.chunk(dist.get_world_size())[dist.get_rank()]


def _check_collectives() -> None:
    dense = _layers()
    wrapped = RotatedTensorParallel(deepcopy(dense), policy=REPLICATED)
    whole, mine = _inputs()
    mean_square(dense(whole)).backward()
    one_weight = 4 * 4 * 8
    for bucket_bytes, buckets in ((32 << 20, 1), (one_weight + 1, 4), (1, 8)):
        wrapped.zero_grad()
        loss = mean_square(wrapped(mine))
        with (
            patch.object(rtp_wrap.replicate, "BUCKET_BYTES", bucket_bytes),
            patch.object(dist, "all_reduce", side_effect=dist.all_reduce) as all_reduce,
        ):
            loss.backward()
        if buckets == 4:  # at least: a bias may go with a neighbour or not
            assert 4 <= all_reduce.call_count < 8
        else:
            assert all_reduce.call_count == buckets
        compare_gradients(dense, wrapped)
    assert all(p.placements == (ReplicatePlacement(),) for p in wrapped.parameters())


@multi_world_sizes
def test_one_backward_makes_one_collective_per_bucket(world_size: int) -> None:
    run_ranks(world_size, _check_collectives)


class Scale(nn.Module):
    """``loss = (weight * x).sum()``, so the gradient of a rank is its ``x``."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
        self.wide = nn.Parameter(torch.zeros(2))
        self.last = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = (self.weight * x + self.last * -x).sum()
        return low + (self.wide * x[:2]).sum()


def _check_sum() -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    wrapped = RotatedTensorParallel(Scale(), policy=REPLICATED)
    # In bfloat16 256 + 1 is 256: only a wider sum gets the ones.
    x = torch.full((3,), 256.0 if rank == 0 else 1.0, dtype=torch.bfloat16, device=device())
    wrapped(x).backward()
    mean = torch.full((3,), (256.0 + world_size - 1) / world_size)
    assert torch.equal(wrapped.weight.grad.to_local().cpu(), mean.bfloat16())
    assert torch.equal(wrapped.last.grad.to_local().cpu(), -mean.bfloat16())
    assert torch.equal(wrapped.wide.grad.to_local().cpu(), mean[:2])


@all_world_sizes
def test_the_mean_of_16_bit_gradients_is_rounded_once(world_size: int) -> None:
    run_ranks(world_size, _check_sum)


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 3)
        self.other = nn.Linear(4, 4)
        self.right.bias = None

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():  # plain tensors of another mode must not be read again below
            x = x + self.trunk(x).sign()
        return self.left(x), self.right(torch.tanh(self.trunk(x)))


def _check_heads(policy: Any) -> None:
    torch.manual_seed(0)
    dense = TwoHeads().to(device(), torch.float64)
    wrapped = RotatedTensorParallel(deepcopy(dense), policy=policy)
    whole, mine = _inputs()
    for model, x in ((dense, whole), (wrapped, mine)):
        left, right = model(x)
        mean_square(left).backward()  # one node for both, passed twice, each time by some
        mean_square(right).backward()
    compare_gradients(dense, wrapped)
    assert wrapped.other.weight.grad is None


@pytest.mark.parametrize("policy", [REPLICATED, None], ids=["all", "default"])
@all_world_sizes
def test_parts_of_a_model_can_have_backwards_of_their_own(world_size: int, policy: Any) -> None:
    run_ranks(world_size, _check_heads, policy)


def _check_frozen() -> None:
    dense = _layers()
    dense[2].requires_grad_(False)
    dense[0].weight.requires_grad_(False)
    wrapped = RotatedTensorParallel(deepcopy(dense), policy=REPLICATED)
    whole, mine = _inputs()
    for _ in range(2):
        dense.zero_grad()
        wrapped.zero_grad()
        mean_square(dense(whole)).backward()
        mean_square(wrapped(mine)).backward()
        compare_gradients(dense, wrapped)
        for model in (dense, wrapped):  # what is trained may change
            model[2].requires_grad_(True)
            model[3].requires_grad_(False)


@all_world_sizes
def test_frozen_parameters_have_no_gradient_and_can_be_thawed(world_size: int) -> None:
    run_ranks(world_size, _check_frozen)


def _check_write_seen_without_parameter_gradients() -> None:
    """What autograd saved of a replicated weight is the weight's own memory."""
    wrapped = RotatedTensorParallel(_layers(), policy=REPLICATED)
    optimizer = torch.optim.AdamW(wrapped.parameters(), fused=True)
    x = _inputs()[1].requires_grad_()
    mean_square(wrapped(x)).backward()
    loss = mean_square(wrapped(x))
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, x)  # the averaging node, which has a check, does not run


@multi_world_sizes
def test_a_write_is_seen_where_only_the_inputs_gradient_is_wanted(world_size: int) -> None:
    run_ranks(world_size, _check_write_seen_without_parameter_gradients)
