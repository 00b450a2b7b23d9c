"""The mean of the parts of a gradient: by torch, and by a kernel, which CPUs interpret."""

from __future__ import annotations

import sys
from typing import Any
from unittest.mock import patch

import pytest
import torch

from rtp_wrap.transport import mean
from rtp_wrap.transport.cells import Landing
from tests.kernels import kernel, needs_triton
from tests.ranks import DEVICE_TYPE

#: The dtype of the parts, of the sums, and of the gradient.
DTYPES = [
    (torch.float32, torch.float32, torch.float32),
    (torch.float64, torch.float64, torch.float64),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32, torch.float32),
    (torch.float16, torch.float32, torch.float16),
    (torch.bfloat16, torch.bfloat16, torch.float32),
]


def _check(put_mean: object, ranks: int, shape: tuple[int, ...], dtypes: object) -> None:
    """Against the mean in fp64, and without a look at what is at its own place."""
    assert callable(put_mean)
    assert isinstance(dtypes, tuple)
    given, sums, kept = dtypes
    generator = torch.Generator().manual_seed(0)
    all_parts = torch.randn(ranks, *shape, generator=generator, dtype=torch.float64)
    all_parts = all_parts.to(DEVICE_TYPE, given)
    for rank in range(ranks):
        parts = all_parts.clone()
        parts[rank] = torch.nan
        out = torch.full(shape, torch.nan, dtype=kept, device=DEVICE_TYPE)
        put_mean(all_parts[rank].clone(), parts, rank, out, sums)
        expected = all_parts.double().mean(0)
        # Sums of 16 bits are added in fp32, each addition with an error of its partial sum's, and
        # then rounded once.
        added = torch.float64 if torch.float64 in (given, sums) else torch.float32
        rounded = max(torch.finfo(sums).eps, torch.finfo(kept).eps)
        addition = torch.finfo(added).eps * ranks * float(all_parts.abs().max())
        torch.testing.assert_close(out.double(), expected, rtol=rounded, atol=addition)


def _by_torch(
    own: torch.Tensor, parts: torch.Tensor, rank: int, out: torch.Tensor, sums: torch.dtype
) -> None:
    other = parts[(rank + 1) % len(parts)]
    landing = Landing(None, parts, parts[rank], other)
    with patch.object(mean, "_kernel", lambda: None):
        mean.put_mean(own, landing, rank, out, sums)


def _by_kernel(*arguments: Any) -> None:
    with kernel("transport.mean_kernel") as module:
        module.put_mean(*arguments)


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_torchs_mean(ranks: int, dtypes: object) -> None:
    _check(_by_torch, ranks, (3, 5), dtypes)


@needs_triton
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_the_kernels_mean(ranks: int, dtypes: object) -> None:
    for shape in ((3, 5), (1, 1), (32, 64), (33, 70)):
        _check(_by_kernel, ranks, shape, dtypes)


def _check_two(put_mean: object) -> None:
    """Of two ranks there is one right result: their sum is rounded, half of it is not."""
    assert callable(put_mean)
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.float64):
        parts = torch.randn(2, 64, 33, generator=generator, dtype=dtype).to(DEVICE_TYPE)
        out = torch.full_like(parts[0], torch.nan)
        for rank in (0, 1):
            put_mean(parts[rank].clone(), parts, rank, out, dtype)
            assert torch.equal(out, (parts[0] + parts[1]) / 2)


def test_torchs_mean_of_two_is_half_of_the_sum_to_the_bit() -> None:
    _check_two(_by_torch)


@needs_triton
def test_the_kernels_mean_of_two_is_half_of_the_sum_to_the_bit() -> None:
    _check_two(_by_kernel)


def test_without_triton_there_is_no_kernel() -> None:
    with patch.dict(sys.modules, {"rtp_wrap.transport.mean_kernel": None}):
        assert mean._kernel.__wrapped__() is None
