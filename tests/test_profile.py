"""Ranges in a profiler's trace: one for every operation that communicates, named by its layer."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.autograd.profiler import emit_nvtx
from torch.profiler import ProfilerActivity, profile, record_function

from rtp_wrap import Gather, Rotate, RotatedTensorParallel, ShardingPolicy
from rtp_wrap.profiling import profiler_range
from tests.parity import mean_square
from tests.ranks import DEVICE_TYPE, device, multi_world_sizes, run_ranks


class Model(nn.Module):
    """One weight that rotates, one that is gathered, two parameters that are replicated."""

    def __init__(self) -> None:
        super().__init__()
        layers = nn.ModuleDict({"up": nn.Linear(8, 16, bias=False), "norm": nn.LayerNorm(16)})
        self.layers = nn.ModuleList([layers])
        self.down = nn.Linear(16, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layers: Any = self.layers[0]
        return self.down(layers["norm"](layers["up"](x)))


def _wrapped(transport: str) -> tuple[nn.Module, torch.Tensor]:
    rules = {"layers.0.up": Rotate(), "down": Gather()}
    policy = ShardingPolicy(rules=rules, transport=transport)
    x = torch.ones(4, 8, device=device(), requires_grad=True)
    return RotatedTensorParallel(Model().to(device()), policy=policy), x


def _ancestors(event: Any) -> Iterator[str]:
    while (event := event.cpu_parent) is not None:
        yield event.name


def _traced(transport: str) -> dict[str, tuple[list[str], list[str]]]:
    """Of every range of this library in one step: what is around it, and what is in it."""
    model, x = _wrapped(transport)
    mean_square(model(x)).backward()
    # Without acc_events torch 2.11 warns that another cycle would take the events away.
    tracing = profile(activities=[ProfilerActivity.CPU], acc_events=True)
    with tracing as trace, record_function("step"):
        loss = mean_square(model(x))
        loss.backward()
    events: list[Any] = list(trace.events() or [])
    ranges = [event for event in events if event.name.startswith("RTP::")]
    found = {
        each.name: (
            list(_ancestors(each)),
            [other.name for other in events if each.name in _ancestors(other)],
        )
        for each in ranges
    }
    assert len(found) == len(ranges)  # each of them once
    return found


#: What each range has in it: a pattern that one of torch's own events matches.
EXPECTED = {
    "RTP::forward (layers.0.up)": r"^aten::(add)?mm$",
    "RTP::gather (down.weight)": "all_?gather",
    "RTP::gather for backward (down.weight)": "all_?gather",
    "RTP::reduce-scatter (down.weight)": "reduce_scatter",
    "RTP::average (layers.0.norm.weight and 1 more)": "allreduce",
    "RTP::backward (layers.0.up)": r"^aten::(add)?mm$",
}


@multi_world_sizes
@pytest.mark.parametrize("transport", ["peer", "ring"])
def test_a_trace_names_layers(world_size: int, transport: str) -> None:
    for found in run_ranks(world_size, _traced, transport):
        assert found.keys() == EXPECTED.keys()
        for name, (around, inside) in found.items():
            assert any(re.search(EXPECTED[name], each) for each in inside), (name, inside)
            in_backward = any("Backward" in each for each in around)
            in_forward = "forward" in name or name == "RTP::gather (down.weight)"
            assert in_backward != in_forward, (name, around)
            if in_forward:
                assert "step" in around


def _unseen(transport: str) -> None:
    model, x = _wrapped(transport)
    refuse = AssertionError("no profiler runs")
    with patch("rtp_wrap.profiling.record_function", side_effect=refuse):
        mean_square(model(x)).backward()


@multi_world_sizes
def test_without_a_profiler_nothing_is_recorded(world_size: int) -> None:
    run_ranks(world_size, _unseen, "ring")
    assert isinstance(profiler_range("forward", "up"), nullcontext)


def _with_nvtx() -> None:
    with emit_nvtx():
        assert isinstance(profiler_range("forward", "up"), record_function)


@pytest.mark.skipif(DEVICE_TYPE != "cuda", reason="NVTX is CUDA's")
@multi_world_sizes
def test_ranges_are_nvtx_ranges_as_well(world_size: int) -> None:
    run_ranks(world_size, _with_nvtx)
