"""A whole training step as one CUDA graph."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
import torch.distributed as dist
from torch import nn

from rtp_wrap import RotatedTensorParallel, ShardingPolicy
from tests.parity import mean_square
from tests.ranks import DEVICE_TYPE, device, multi_world_sizes, run_ranks

pytestmark = pytest.mark.skipif(DEVICE_TYPE != "cuda", reason="graphs are CUDA's")


def _model(layers: int) -> nn.Module:
    torch.manual_seed(0)
    parts = [module for _ in range(layers) for module in (nn.Linear(64, 64), nn.Tanh())]
    return nn.Sequential(*parts).to(device())


def _check(layers: int) -> None:
    """With an odd and an even number of cells, and with eager forwards between the replays."""
    policy = ShardingPolicy(replicate_below=128, transport="peer")
    batches = [
        torch.randn(8, 64, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
        for step in range(10)
    ]
    batches = [each.to(device()) for each in batches]
    original = _model(layers)
    outputs = []
    for graphed in (False, True):
        model = RotatedTensorParallel(deepcopy(original), policy=policy)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True, capturable=True)
        x = batches[0].clone()

        def step(
            model: nn.Module = model,
            optimizer: torch.optim.Optimizer = optimizer,
            x: torch.Tensor = x,
        ) -> torch.Tensor:
            optimizer.zero_grad()
            loss = mean_square(model(x))
            loss.backward()
            optimizer.step()
            return loss.detach()

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        losses = []
        with torch.cuda.stream(stream):
            for batch in batches[:3]:
                x.copy_(batch)
                losses.append(step())
        torch.cuda.current_stream().wait_stream(stream)
        if graphed:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                loss = step()
        for batch in batches[3:]:
            x.copy_(batch)
            if graphed:
                graph.replay()
                losses.append(loss.clone())
            else:
                losses.append(step())
            with torch.no_grad():
                losses.append(mean_square(model(batch)))
        outputs.append(torch.stack(losses))
        torch.cuda.synchronize()
    # The same kernels on the same numbers.
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=0)


@multi_world_sizes
@pytest.mark.parametrize("layers", [2, 3])
def test_a_captured_step_is_the_eager_one(world_size: int, layers: int) -> None:
    run_ranks(world_size, _check, layers)
