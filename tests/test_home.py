"""Home shards: every rank ends up with its own part of rank 0's values, piece by piece."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import pytest

if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import rtp_wrap.home
from rtp_wrap import Gather, Replicate, Rotate
from rtp_wrap.home import settle, settle_buffer
from rtp_wrap.policy import Strategy
from rtp_wrap.ring import Ring
from rtp_wrap.rings import Rings
from tests.ranks import DEVICE_TYPE, all_world_sizes, device, run_ranks


def _ring() -> Ring:
    mesh = init_device_mesh(DEVICE_TYPE, (dist.get_world_size(),))
    return Ring(Rings(mesh), device(), overlap=True)


def _on_rank_0(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on rank 0, as zeros of the same layout on the others."""
    return tensor if dist.get_rank() == 0 else tensor * 0


CASES: list[tuple[tuple[int, ...], Strategy]] = [
    ((7, 5), Rotate(0)),
    ((7, 5), Rotate(1)),
    ((2, 9), Rotate(0)),  # with four ranks some own nothing
    ((9, 2), Rotate(1)),
    ((12,), Gather()),
    ((5, 3, 2), Gather()),
    ((5, 3, 2), Gather(1)),
    ((5, 3, 2), Gather(2)),
    ((1,), Gather()),
    ((0, 4), Gather()),
    ((4, 0), Gather()),
    ((3, 4), Replicate()),
    ((), Replicate()),
    ((0,), Replicate()),
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64]


def _shards(piece_bytes: int) -> None:
    ring = _ring()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    with mock.patch.object(rtp_wrap.home, "PIECE_BYTES", piece_bytes):
        for shape, home in CASES:
            for dtype in DTYPES:
                whole = torch.arange(math.prod(shape)).reshape(shape).to(dtype)
                settled: Any = settle(nn.Parameter(_on_rank_0(whole)), home, ring)
                assert isinstance(settled, DTensor)
                assert isinstance(settled, nn.Parameter)
                assert settled.shape == whole.shape
                assert settled.device.type == device().type
                expected = whole
                if not isinstance(home, Replicate):
                    assert isinstance(home, Rotate | Gather)
                    chunks = whole.chunk(world_size, home.dim)
                    none = whole.narrow(home.dim, 0, 0)
                    expected = chunks[rank] if rank < len(chunks) else none
                local = settled._local_tensor
                assert torch.equal(local.cpu(), expected), (shape, home, dtype)
                assert local.is_contiguous()
                assert torch.equal(settled.full_tensor().cpu(), whole), (shape, home, dtype)


@all_world_sizes
@pytest.mark.parametrize("piece_bytes", [1, 24, 16 << 20])
def test_each_rank_has_its_chunk_of_rank_0s_values(world_size: int, piece_bytes: int) -> None:
    run_ranks(world_size, _shards, piece_bytes)


def _kept() -> None:
    ring = _ring()
    for strided in (
        torch.randn(4, 6).t(),
        torch.randn(8, 6)[::2],
        torch.randn(6).expand(4, 6),
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    ):
        parameter = nn.Parameter(_on_rank_0(strided.clone() if strided.stride(0) == 0 else strided))
        parameter.is_special = True  # type: ignore[attr-defined]
        settled: Any = settle(parameter, Gather(), ring)
        assert torch.equal(settled.full_tensor().cpu(), strided)
        assert settled.is_special
        assert settled.requires_grad
    frozen = nn.Parameter(torch.arange(6), requires_grad=False)
    assert not settle(frozen, Gather(), ring).requires_grad
    with torch.no_grad():
        assert settle(nn.Parameter(torch.ones(4)), Gather(), ring).requires_grad


@all_world_sizes
def test_any_layout_is_settled_and_attributes_are_kept(world_size: int) -> None:
    run_ranks(world_size, _kept)


def _buffers() -> None:
    ring = _ring()
    for buffer in (
        torch.arange(6.0),
        torch.arange(6).view(2, 3).t(),
        torch.tensor(3),
        torch.tensor([True, False]),
        torch.arange(4).expand(3, 4),
        torch.zeros(0, 2),
    ):
        mine = buffer.clone() if dist.get_rank() == 0 else torch.zeros_like(buffer)
        settled = settle_buffer(mine, ring)
        assert torch.equal(settled.cpu(), buffer)
        assert settled.device == device()
        assert settled.dtype == buffer.dtype


@all_world_sizes
def test_buffers_are_rank_0s(world_size: int) -> None:
    run_ranks(world_size, _buffers)


class _Sizes(torch.utils._python_dispatch.TorchDispatchMode):
    """Remembers the largest tensor that was made on the device, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.empty.memory_format:
            self.largest = max(self.largest, result.nbytes)
        return result


def _pieces() -> None:
    ring = _ring()
    parameter = nn.Parameter(torch.randn(64, 32))
    with mock.patch.object(rtp_wrap.home, "PIECE_BYTES", 1024), _Sizes() as sizes:
        settled: Any = settle(parameter, Rotate(0), ring)
    shard = parameter.nbytes // dist.get_world_size()
    assert sizes.largest <= max(1024, -(-shard // 1024) * 1024)
    assert settled._local_tensor.untyped_storage().nbytes() <= -(-64 // dist.get_world_size()) * 128


@all_world_sizes
def test_nothing_on_the_device_is_larger_than_a_shard_or_a_piece(world_size: int) -> None:
    run_ranks(world_size, _pieces)
