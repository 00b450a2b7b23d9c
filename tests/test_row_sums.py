"""The gradient of a table of embeddings, tile by tile: by torch, and by a kernel.

What layers do with it is tested in `test_embedding`.
"""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn

from rtp_wrap import RotatedTensorParallel, ShardingPolicy
from rtp_wrap.ops import row_sums
from rtp_wrap.ops.row_sums import RowSums
from rtp_wrap.shard import Tile, TileGrid
from tests.kernels import kernel, needs_triton
from tests.parity import FP64, full, mean_square
from tests.ranks import DEVICE_TYPE, device, multi_world_sizes, run_ranks

#: Ids for a table of eleven rows: some several times, more often than a program loads rows at once;
#: none of some rows; all the same.
IDS = (
    torch.tensor([10, 0, 3, 3, 0, 7, 10]),
    torch.tensor([5] * 21 + [0, 10] * 9),
    torch.tensor([4, 9]).int(),
    torch.tensor([2] * 8),
)


def _ways(way: str) -> Any:
    """A patch by which gradients are torch's own, or the kernel's."""
    if way == "torch":
        return patch.object(row_sums, "_kernel", lambda kind: None)
    with kernel("ops.row_sums_kernel") as module:
        return patch.object(row_sums, "_kernel", lambda kind: module.sum_rows)


ways = pytest.mark.parametrize("way", ["torch", pytest.param("kernel", marks=needs_triton)])


def _check(
    sums: RowSums, expected: torch.Tensor, grid: TileGrid, dtype: torch.dtype, rtol: float
) -> None:
    """All tiles of all owners, alone and added to something with a scale, in ``dtype``."""
    for cell in grid.cells():
        for owner in range(grid.world_size):
            tile: Tile = grid.tile(owner, cell)
            if not tile.numel:
                continue
            out = torch.full(tile.shape, torch.nan, dtype=dtype, device=DEVICE_TYPE)
            sums.wgrad(tile, None, out, 1.0)
            wanted = expected[tile.rows, tile.cols]
            torch.testing.assert_close(out.double(), wanted, rtol=rtol, atol=rtol)
            sums.wgrad(tile, out, out, 0.5)
            torch.testing.assert_close(out.double(), 1.5 * wanted, rtol=2 * rtol, atol=2 * rtol)


@ways
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("cols", [1, 16, 1500])
@pytest.mark.parametrize("by_freq", [False, True])
@pytest.mark.parametrize("padding", [None, 5])
def test_every_tile_has_the_sums_of_its_rows(
    way: str, dim: int, cols: int, by_freq: bool, padding: int | None
) -> None:
    """Of a table cut for three owners, in tiles of a few rows and columns."""
    generator = torch.Generator().manual_seed(0)
    grid = TileGrid((11, cols), dim, 3, max(2, 2 * min(cols, 1100)))
    dtypes = [(torch.float64, torch.float64)]
    if not by_freq:  # quotients are not exact
        dtypes += [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]
    for dtype, sums_dtype in dtypes:
        # Sums of small whole numbers are exact in any order, in bfloat16 up to 256.
        rtol = 1e-14 if by_freq else 0.0
        for ids in IDS:
            dy = torch.randint(-3, 4, (len(ids), cols), generator=generator)
            dense = nn.Embedding(11, cols, padding_idx=padding, dtype=torch.float64)
            dense(ids).backward(dy.double())
            assert dense.weight.grad is not None
            expected = dense.weight.grad.to(DEVICE_TYPE)
            if by_freq:
                expected /= torch.bincount(ids, minlength=11).clamp(min=1)[:, None].to(DEVICE_TYPE)
            given = ids.to(DEVICE_TYPE), dy.to(DEVICE_TYPE, dtype)
            sums = RowSums(*given, 11, padding, by_freq)
            with _ways(way):
                _check(sums, expected, grid, sums_dtype, rtol)


@ways
def test_gradients_may_have_any_strides(way: str) -> None:
    """One row for all, as of a sum; and columns of a larger tensor, the wrong way round."""
    ids = IDS[0].to(DEVICE_TYPE)
    grid = TileGrid((11, 6), 0, 2, 12)
    row = torch.arange(6.0, dtype=torch.float64, device=DEVICE_TYPE)
    block = torch.arange(84.0, dtype=torch.float64, device=DEVICE_TYPE).view(12, 7)
    for dy in (row.expand(7, 6), row[:1].expand(7, 6), block[::2].t()):
        expected = torch.zeros(11, 6, dtype=torch.float64, device=DEVICE_TYPE)
        expected.index_add_(0, ids, dy)
        with _ways(way):
            _check(RowSums(ids, dy, 11, None, False), expected, grid, torch.float64, 0.0)


@ways
def test_without_ids_there_is_nothing_to_add(way: str) -> None:
    ids = torch.empty(0, dtype=torch.int64, device=DEVICE_TYPE)
    dy = torch.empty(0, 6, dtype=torch.float64, device=DEVICE_TYPE)
    expected = torch.zeros(11, 6, dtype=torch.float64, device=DEVICE_TYPE)
    grid = TileGrid((11, 6), 0, 2, 12)
    with _ways(way):
        _check(RowSums(ids, dy, 11, None, False), expected, grid, torch.float64, 0.0)


def test_without_triton_there_is_no_kernel() -> None:
    with patch.dict(sys.modules, {"rtp_wrap.ops.row_sums_kernel": None}):
        assert row_sums._kernel.__wrapped__("cuda") is None


def _trained(transport: str) -> int:
    """The kernel among ranks, with cut tables, padding and few ids or many; how often it ran."""
    calls: Counter[str] = Counter()

    def counted(*args: Any) -> None:
        calls["kernel"] += 1
        module.sum_rows(*args)

    with kernel("ops.row_sums_kernel") as module:
        for rows, cols, count in ((40, 6, 3), (21, 3, 90), (9, 40, 0)):
            torch.manual_seed(rows)
            dense = nn.Embedding(rows, cols, padding_idx=1, dtype=torch.float64, device=device())
            policy = ShardingPolicy(replicate_below=0, transport=transport, staging_bytes=7 * 160)
            generator = torch.Generator().manual_seed(dist.get_rank())
            ids = torch.randint(rows, (count,), generator=generator).to(device())
            (mean_square(dense(ids)) if count else dense(ids).sum()).backward()
            assert dense.weight.grad is not None
            expected = dense.weight.grad.clone()
            dist.all_reduce(expected)
            dense.zero_grad()
            wrapped = RotatedTensorParallel(nn.Sequential(dense), policy=policy)
            with patch.object(row_sums, "_kernel", lambda kind: counted):
                y = wrapped(ids)
                (mean_square(y) if count else y.sum()).backward()
            gradient = full(wrapped.get_parameter("0.weight").grad)
            torch.testing.assert_close(gradient, expected / dist.get_world_size(), **FP64)
    return calls["kernel"]


@needs_triton
@multi_world_sizes
@pytest.mark.parametrize("transport", ["peer", "ring"])
def test_the_kernel_among_ranks(world_size: int, transport: str) -> None:
    assert all(run_ranks(world_size, _trained, transport))
