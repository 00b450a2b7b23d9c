"""``torch.autograd.detect_anomaly()`` over a wrapped model."""

from __future__ import annotations

from typing import Any

import pytest

if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))

import torch
import torch.distributed as dist
from torch import nn

from rtp_wrap import Gather, Replicate, Rotate, RotatedTensorParallel
from tests.ranks import all_world_sizes, device, run_ranks

POLICIES: list[Any] = [
    {"*": Replicate()},
    {"*": Gather()},
    {"weight": Rotate(), "bias": Gather()},
    {"weight": Rotate(dim=1), "bias": Gather()},
]


def _check_anomalies() -> None:
    for policy in POLICIES:
        model = RotatedTensorParallel(nn.Linear(7, 9).to(device()), policy=policy)
        x, upstream = torch.randn(4, 7, device=device()), torch.ones(4, 9, device=device())
        with torch.autograd.detect_anomaly(check_nan=True):
            model(x).backward(upstream)
        # NaN in one element of the weight's gradient, which is in the last rank's shard.
        x[0, -1], upstream[0, -1] = float("inf"), 0
        anomaly = torch.autograd.detect_anomaly(check_nan=True)
        with pytest.raises(RuntimeError, match="returned nan values"), anomaly:
            model(x).backward(upstream)
        dist.barrier()


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.filterwarnings("ignore:Error detected in")
@all_world_sizes
def test_anomaly_mode_finds_a_nan_in_any_shard_and_tells_all_ranks(world_size: int) -> None:
    run_ranks(world_size, _check_anomalies, timeout=60.0)
