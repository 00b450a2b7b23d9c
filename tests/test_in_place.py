"""What layers return may be changed in place, by the model and by whoever called it."""

from __future__ import annotations

from copy import deepcopy

import pytest

if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))

import torch
import torch.distributed as dist
from torch import nn

from rtp_wrap import RotatedTensorParallel, ShardingPolicy
from tests.parity import FP64, compare_gradients
from tests.ranks import all_world_sizes, device, run_ranks
from tests.rotated import COMPILERS_WARNINGS

pytestmark = COMPILERS_WARNINGS


class Model(nn.Module):
    """Every rotated layer, each followed by something that changes its output."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 8)
        self.drop = nn.Dropout(0.0, inplace=True)
        self.up = nn.Linear(8, 12)
        self.relu = nn.ReLU(inplace=True)
        self.down = nn.Linear(12, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.bag = nn.EmbeddingBag(30, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.drop(self.table(ids))
        x.mul_(2)
        y = self.down(self.relu(self.up(x)))
        y += x
        y[:, 0] = 0
        attended, _ = self.attention(y, y, y)
        attended *= 2
        mixed = self.conv(attended.transpose(1, 2))
        mixed.add_(1)
        bags = self.bag(ids)
        bags.mul_(3)
        one = self.up(torch.ones_like(x[0, 0]))  # of one dimension
        one.relu_()
        return mixed.sum(2) + bags + one[:8]


def _change_in_place(compiled: bool) -> None:
    torch.manual_seed(0)
    dense = Model().to(device(), torch.float64)
    mine = deepcopy(dense)
    if compiled:
        for layer in (mine.up, mine.down):
            layer.compile(backend="aot_eager")
    wrapped = RotatedTensorParallel(mine, policy=ShardingPolicy(replicate_below=0))
    ranks, rank = dist.get_world_size(), dist.get_rank()
    whole = torch.arange(10 * ranks).remainder(30).view(2 * ranks, 5).to(device())
    results = []
    for model, ids in ((dense, whole), (wrapped, whole.chunk(ranks)[rank])):
        y = model(ids)
        y.mul_(3)
        y.square().mean().backward()
        results.append(y.detach())
    torch.testing.assert_close(results[1], results[0].chunk(ranks)[rank], **FP64)
    compare_gradients(dense, wrapped)


@all_world_sizes
@pytest.mark.parametrize("compiled", [False, True])
def test_outputs_may_be_changed_in_place(world_size: int, compiled: bool) -> None:
    run_ranks(world_size, _change_in_place, compiled)
