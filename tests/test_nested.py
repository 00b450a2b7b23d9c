"""Sequences of different lengths as a jagged nested tensor, in layers that rotate."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))

from rtp_wrap import Replicate, Rotate, RotatedTensorParallel, ShardingPolicy
from tests.parity import compare_gradients
from tests.ranks import all_world_sizes, device, multi_world_sizes, run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.first = nn.Embedding(11, 6), nn.Linear(6, 8)
        self.norm, self.last = nn.LayerNorm(8), nn.Linear(8, 8, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.norm(self.first(self.embedding(ids)))
        return h + self.last(h)


def _ids(rank: int) -> torch.Tensor:
    """Sequences of other lengths on every rank."""
    generator = torch.Generator().manual_seed(rank)
    ids = [torch.randint(11, (length,), generator=generator) for length in (2 + rank, 5)]
    return torch.nested.nested_tensor(ids, layout=torch.jagged, device=device())


def _trains() -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    dense = Model().to(device(), torch.float64)
    for policy in (
        ShardingPolicy(replicate_below=0),
        ShardingPolicy(rules={"*.weight": Rotate(dim=1), "*": Replicate()}, replicate_below=0),
    ):
        dense.zero_grad()
        for each in range(world_size):
            values: Any = dense(_ids(each))
            values.values().square().mean().div(world_size).backward()
        wrapped = RotatedTensorParallel(deepcopy(dense), policy=policy)
        output: Any = wrapped(_ids(rank))
        expected: Any = dense(_ids(rank))
        for ours, theirs in zip(output.unbind(), expected.unbind(), strict=True):
            torch.testing.assert_close(ours, theirs)
        output.values().square().mean().backward()
        compare_gradients(dense, wrapped)


@all_world_sizes
def test_jagged_tensors_go_through_linears_and_embeddings(world_size: int) -> None:
    run_ranks(world_size, _trains)


def _strided() -> None:
    wrapped = RotatedTensorParallel(
        nn.Sequential(nn.Linear(6, 8)).to(device()), policy=ShardingPolicy(replicate_below=0)
    )
    x = torch.nested.nested_tensor([torch.ones(2, 6), torch.ones(3, 6)], device=device())
    with pytest.raises(TypeError, match=r"^0: .*torch\.jagged only.*Gather\(\)"):
        wrapped(x)


@multi_world_sizes
def test_other_nested_tensors_are_refused_by_name(world_size: int) -> None:
    run_ranks(world_size, _strided)
