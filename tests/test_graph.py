"""Steps and forwards as CUDA graphs, replayed beside eager ones, compute what they do eagerly.

The same kernels on the same numbers: so everything is compared bit for bit. Ranks are late at
replays, one after the other, by the stream or by the host, so that others run ahead of them where a
barrier does not hold.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from rtp_wrap import RotatedTensorParallel, ShardingPolicy
from tests.parity import mean_square
from tests.ranks import DEVICE_TYPE, WORLD_SIZES, device, multi_world_sizes, run_ranks
from tests.rotated import mesh_of_rings

pytestmark = pytest.mark.skipif(DEVICE_TYPE != "cuda", reason="graphs are CUDA's")

#: Layers of this width, 16 MiB of weights in fp32, take longer to pull than to compute with.
WIDE = 2048
#: With it a layer is one cell, also where transfers do not overlap.
STAGING = 7 * 17 * 2**20
#: A millisecond or two, in which another rank could do several layers.
SECONDS, CYCLES = 1.5e-3, 3_000_000
ROUNDS = 6
#: In the place of a number of layers.
THRICE = 0

Step = Callable[[torch.Tensor], torch.Tensor]


class Thrice(nn.Module):
    """What comes after a layer is itself, or not: what is expected last does not come."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            x = self.layer(x).tanh()
        return x


class Graph:
    """A step whose input and result stay where they are, replayed."""

    def __init__(self, step: Step, x: torch.Tensor) -> None:
        self._x = x.clone()
        self._graph = torch.cuda.CUDAGraph()
        # Other threads, such as NCCL's watchdog, may call CUDA meanwhile.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._result = step(self._x)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self._x.copy_(x)
        self._graph.replay()
        return self._result.clone()


class Capture:
    """Makes a graph of a step for inputs like ``x``, or leaves it as it is."""

    def __init__(self, *, graphs: bool) -> None:
        self._makes_graphs = graphs
        #: They must outlive their last replay.
        self._graphs: list[Graph] = []

    def __call__(self, step: Step, x: torch.Tensor) -> Step:
        if not self._makes_graphs:
            return step
        self._graphs.append(Graph(step, x))
        return self._graphs[-1]


Program = Callable[[RotatedTensorParallel, Capture, int], Iterator[torch.Tensor]]


def _model(layers: int, width: int) -> nn.Module:
    torch.manual_seed(0)
    if layers == THRICE:
        return Thrice(width).to(device())
    biases = width < WIDE  # replicated ones, whose gradients NCCL averages in the graph
    parts = [
        module for _ in range(layers) for module in (nn.Linear(width, width, biases), nn.Tanh())
    ]
    return nn.Sequential(*parts).to(device())


def _check(
    program: Program,
    layers: int,
    width: int = WIDE,
    inplace: bool = False,
    rings: int | None = None,
) -> None:
    """What ``program`` yields with and without graphs, and the weights it ends with."""
    policy = ShardingPolicy(replicate_below=2 * width, transport="peer", staging_bytes=STAGING)
    original = _model(layers, width)
    mesh = None if rings is None else mesh_of_rings(rings)
    results = []
    for graphs in (False, True):
        model = RotatedTensorParallel(deepcopy(original), mesh=mesh, policy=policy, inplace=inplace)
        capture = Capture(graphs=graphs)
        results.append([*program(model, capture, width), *_home(model)])
        torch.cuda.synchronize()
    for graphed, eager in zip(*reversed(results), strict=True):
        torch.testing.assert_close(graphed, eager, rtol=0, atol=0)


def _home(model: nn.Module) -> list[torch.Tensor]:
    """This rank's own memory of the weights."""
    return [getattr(each, "_local_tensor", each).detach() for each in model.parameters()]


def _batches(size: int, width: int) -> Iterator[torch.Tensor]:
    """Endless, others on every rank; on the device without waiting for it."""
    generator = torch.Generator(device()).manual_seed(100 * size + dist.get_rank())
    while True:
        yield torch.randn(size, width, generator=generator, device=device())


def _step(model: RotatedTensorParallel) -> Step:
    """A training step; returns the loss."""
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True, capturable=True)

    def step(x: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = mean_square(model(x))
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def _forward(model: RotatedTensorParallel) -> Step:
    @torch.no_grad()
    def forward(x: torch.Tensor) -> torch.Tensor:
        return model(x)

    return forward


def _warmed_up(step: Step, batches: Iterator[torch.Tensor]) -> list[torch.Tensor]:
    """On a stream of its own, as graphs are captured on one: some steps."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results = [step(next(batches)) for _ in range(3)]
    torch.cuda.current_stream().wait_stream(stream)
    return results


def _be_late(turn: int) -> None:
    """In every turn one rank, by its stream and then by its host."""
    if dist.get_rank() != turn // 2 % dist.get_world_size():
        return
    if turn % 2 == 0:
        torch.cuda._sleep(CYCLES)
    else:
        time.sleep(SECONDS)


def _train(model: RotatedTensorParallel, capture: Capture, width: int) -> Iterator[torch.Tensor]:
    """Steps with a forward before each, and the first one right after the capture."""
    batches = _batches(8, width)
    step, forward = _step(model), _forward(model)
    yield from _warmed_up(step, batches)
    captured = capture(step, next(batches))
    for turn in range(ROUNDS):
        yield forward(next(batches))
        _be_late(turn)
        yield captured(next(batches))
        yield captured(next(batches))


@multi_world_sizes
@pytest.mark.parametrize(("layers", "width"), [(2, 64), (3, 64), (3, WIDE), (THRICE, WIDE)])
def test_a_captured_step_is_the_eager_one(world_size: int, layers: int, width: int) -> None:
    """With an odd and an even number of cells, small and large ones, and a layer used thrice."""
    run_ranks(world_size, _check, _train, layers, width)


@multi_world_sizes
def test_a_captured_step_is_the_eager_one_in_place(world_size: int) -> None:
    run_ranks(world_size, _check, _train, 3, WIDE, inplace=True)


@pytest.mark.parametrize(
    ("world_size", "rings"),
    [shape for shape in ((2, 1), (2, 2), (4, 2)) if shape[0] in WORLD_SIZES],
)
@pytest.mark.parametrize("inplace", [False, True])
def test_a_captured_step_of_rings_is_the_eager_one(
    world_size: int, rings: int, inplace: bool
) -> None:
    run_ranks(world_size, _check, _train, 3, WIDE, inplace=inplace, rings=rings)


def _infer(model: RotatedTensorParallel, capture: Capture, width: int) -> Iterator[torch.Tensor]:
    """Forwards of two batch sizes, captured one right after the other.

    Weights change before each, so that it matters of when the tiles are that ranks pull.
    """
    forward = _forward(model)
    few, many = _batches(8, width), _batches(24, width)
    for batches in (few, many):
        yield from _warmed_up(forward, batches)
    captured = [capture(forward, next(batches)) for batches in (few, many)]
    for turn, which in enumerate((0, 1, 0, 1, 1, 0, 0, 1)):
        _be_late(turn)
        for weight in _home(model):
            weight.mul_(-1.01)
        yield captured[which](next((few, many)[which]))
        if turn >= 4:  # beside an eager one, as well
            yield forward(next(few))


@multi_world_sizes
@pytest.mark.parametrize("layers", [1, 4])
@pytest.mark.parametrize("inplace", [False, True])
def test_captured_forwards_are_eager_ones(world_size: int, layers: int, inplace: bool) -> None:
    run_ranks(world_size, _check, _infer, layers, inplace=inplace)


def _train_two(
    model: RotatedTensorParallel, capture: Capture, width: int
) -> Iterator[torch.Tensor]:
    """Steps of two batch sizes, in turn, with forwards between captures and between replays."""
    few, many = _batches(8, width), _batches(24, width)
    step, forward = _step(model), _forward(model)
    for batches in (few, many):
        yield from _warmed_up(step, batches)
    first = capture(step, next(few))
    yield forward(next(few))
    second = capture(step, next(many))
    for turn in range(ROUNDS):
        _be_late(turn)
        yield first(next(few))
        if turn % 2 == 0:
            yield forward(next(few))
        yield second(next(many))
        yield forward(next(few))


@multi_world_sizes
@pytest.mark.parametrize("layers", [1, 3])
def test_captured_steps_may_take_turns(world_size: int, layers: int) -> None:
    run_ranks(world_size, _check, _train_two, layers)


def _infer_within(
    model: RotatedTensorParallel, capture: Capture, width: int
) -> Iterator[torch.Tensor]:
    """Eager steps, with a captured forward of other data between their forward and backward."""
    few, many = _batches(8, width), _batches(24, width)
    forward = _forward(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(x: torch.Tensor, within: Step) -> torch.Tensor:
        optimizer.zero_grad()
        loss = mean_square(model(x))
        _be_late(len(inferred))
        inferred.append(within(next(many)))
        loss.backward()
        optimizer.step()
        return loss.detach()

    inferred: list[torch.Tensor] = []
    yield from _warmed_up(lambda x: step(x, forward), few)
    yield from _warmed_up(forward, many)
    captured = capture(forward, next(many))
    for _ in range(ROUNDS):
        yield step(next(few), captured)
    yield from inferred


@multi_world_sizes
@pytest.mark.parametrize("layers", [1, 3])
def test_a_captured_forward_may_run_within_a_step(world_size: int, layers: int) -> None:
    run_ranks(world_size, _check, _infer_within, layers)
