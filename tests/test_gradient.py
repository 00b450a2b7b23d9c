"""Gradients of rotated weights on their way from the averages to ``.grad``."""

from __future__ import annotations

import functools
import itertools
import threading
from copy import deepcopy
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn

from rtp_wrap import Gather, RotatedTensorParallel, ShardingPolicy
from rtp_wrap.ops import pull
from rtp_wrap.ops.gradient import SITES_BETWEEN
from rtp_wrap.transport import peer
from tests.parity import compare_gradients, compare_weights, full, mean_square, sgd
from tests.ranks import DEVICE_TYPE, device, multi_world_sizes, run_ranks

WIDTH = 24
#: On a GPU averages are later than the host, by so many cycles (a millisecond or so).
CYCLES = 2_000_000


class Chain(nn.Sequential):
    """Layers of one size, one after the other."""

    def __init__(self, depth: int) -> None:
        super().__init__(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(depth)])


def _backwards(steps: int, nodes_before: int = 0) -> list[list[str]]:
    """In what order the backwards of layers and the nodes of their weights come, step by step."""
    depth = SITES_BETWEEN + 4
    policy = ShardingPolicy(replicate_below=0, transport="peer")
    wrapped = RotatedTensorParallel(Chain(depth).to(device()), policy=policy)
    seen: list[str] = []

    def backward(ring: Any, event: str, *args: Any) -> Any:
        seen.append(f"layer {event[0]}")
        return original(ring, event, *args)

    for index, weight in enumerate(wrapped.parameters()):
        weight.register_hook(lambda _, index=index: seen.append(f"weight {index}"))  # type: ignore[misc]
    original, orders = pull.backward, []

    def train() -> None:
        x = torch.randn(2, WIDTH, device=device())
        other = torch.ones(1, requires_grad=True)
        for _ in range(nodes_before):
            other = other * 1
        for _ in range(steps):
            wrapped(x).sum().backward()
            orders.append(seen.copy())
            seen.clear()

    with patch.object(pull, "backward", backward):
        thread = threading.Thread(target=train)  # each has numbers of its own for its nodes
        thread.start()
        thread.join()
    return orders


def _backwards_behind_other_nodes() -> list[list[str]]:
    """Of which ranks have made unlike numbers."""
    return _backwards(steps=2, nodes_before=5 * dist.get_rank())


@multi_world_sizes
def test_a_gradient_is_taken_some_layers_later(world_size: int) -> None:
    """What takes it waits for the average, so that it must not come before others' products."""
    for seen in itertools.chain(*run_ranks(world_size, _backwards, 2)):
        depth = len(seen) // 2
        assert depth == SITES_BETWEEN + 4
        for index in range(depth):
            weight = seen.index(f"weight {index}")
            between = max(0, index - SITES_BETWEEN)
            assert seen.index(f"layer {between}") < weight, seen
            if index > SITES_BETWEEN:  # and not much later: gradients would pile up
                assert weight < seen.index(f"layer {between - 1}"), seen


@multi_world_sizes
def test_ranks_take_gradients_in_one_order(world_size: int) -> None:
    """Hooks may communicate, and so does an optimizer's step in one."""
    first, *others = run_ranks(world_size, _backwards_behind_other_nodes)
    assert all(orders == first for orders in others)
    assert first[0] == first[1]


def _nested(transport: str) -> None:
    """A hook has another loss's gradients while those of weights are on their way."""
    torch.manual_seed(0)
    dense = Chain(SITES_BETWEEN + 3).to(device(), torch.float64)
    policy = ShardingPolicy(replicate_below=0, transport=transport)
    wrapped = RotatedTensorParallel(deepcopy(dense), policy=policy)
    batch = torch.randn(dist.get_world_size(), 2, WIDTH).to(device(), torch.float64)
    for model, x in ((dense, batch.flatten(0, 1)), (wrapped, batch[dist.get_rank()])):
        layers = list(model.children()) if model is dense else list(wrapped.module.children())  # type: ignore[operator]
        outputs: list[torch.Tensor] = []
        for layer in layers:
            layer.register_forward_hook(lambda *args: outputs.append(args[2]))  # noqa: B023
        y = model(x)
        other, within = (y * 5).sum(), []

        def hook(gradient: torch.Tensor) -> None:
            if not within:  # noqa: B023
                within.append(gradient)  # noqa: B023
                torch.autograd.grad(other, outputs[2], retain_graph=True)  # noqa: B023

        outputs[2].register_hook(hook)
        mean_square(y).backward(retain_graph=True)
        assert within
    compare_gradients(dense, wrapped)


@pytest.mark.parametrize("transport", ["peer", "ring"])
@multi_world_sizes
def test_a_backward_within_a_backward_has_gradients_of_its_own(
    world_size: int, transport: str
) -> None:
    run_ranks(world_size, _nested, transport)


class Shared(nn.Module):
    """Rotated and gathered layers, in one use and in several."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.again = nn.Linear(WIDTH, WIDTH)
        self.gathered = nn.Linear(WIDTH, WIDTH)
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for _ in range(3):
            x = self.gathered(self.again(x).tanh()).tanh()
        return self.last(x)


def _penalty(model: nn.Module) -> torch.Tensor:
    """Of several parts, so that each parameter has several gradients that are none of a layer."""
    terms: list[Any] = []
    for parameter in model.parameters():
        terms += [parameter.square().sum(), parameter.abs().sum(), (parameter - 1).square().sum()]
    return 1e-3 * torch.stack([full(term) for term in terms]).sum()


def _put_late(original: Any, *args: Any) -> None:
    if DEVICE_TYPE == "cuda":
        torch.cuda._sleep(CYCLES)
    original(*args)


def _from_everywhere(transport: str) -> None:
    torch.manual_seed(0)
    dense = Shared().to(device(), torch.float64)
    policy = ShardingPolicy(
        rules={"gathered.*": Gather()}, replicate_below=WIDTH + 1, transport=transport
    )
    wrapped = RotatedTensorParallel(deepcopy(dense), policy=policy)
    optimizers = [sgd(model.parameters()) for model in (dense, wrapped)]
    batches = torch.randn(3, dist.get_world_size(), 2, WIDTH).to(device(), torch.float64)
    late = functools.partial(_put_late, peer.put_mean)
    with patch.object(peer, "put_mean", late):
        # The penalty's part of the graph is older than the forward's, or younger, or not there.
        for batch, when in zip(batches, ("before", "after", "never"), strict=True):
            for model in (dense, wrapped):
                x = batch.flatten(0, 1) if model is dense else batch[dist.get_rank()]
                for _ in range(2):  # the second time gradients exist
                    before = _penalty(model) if when == "before" else 0
                    loss = mean_square(model(x))
                    after = _penalty(model) if when == "after" else 0
                    (before + loss + after).backward()
            compare_gradients(dense, wrapped, when=when)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    compare_weights(dense, wrapped)


@pytest.mark.parametrize("transport", ["peer", "ring"])
@multi_world_sizes
def test_gradients_from_everywhere_are_added_up(world_size: int, transport: str) -> None:
    """Autograd adds DTensors without telling the allocator on which stream, wherever that is."""
    run_ranks(world_size, _from_everywhere, transport)


def _triple(parameter: torch.Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad.mul_(3)


def _uses_of_hooks() -> None:
    """What hooks see and do is right on the stream that they run on."""
    torch.manual_seed(0)
    dense = Chain(3).to(device(), torch.float64)
    policy = ShardingPolicy(replicate_below=0, transport="peer")
    wrapped = RotatedTensorParallel(deepcopy(dense), policy=policy)
    for parameter in itertools.chain(dense.parameters(), wrapped.parameters()):
        parameter.register_hook(lambda gradient: gradient * 2)
        parameter.register_post_accumulate_grad_hook(_triple)
    batch = torch.randn(dist.get_world_size(), 2, WIDTH).to(device(), torch.float64)
    with patch.object(peer, "put_mean", functools.partial(_put_late, peer.put_mean)):
        mean_square(dense(batch.flatten(0, 1))).backward()
        mean_square(wrapped(batch[dist.get_rank()])).backward()
        compare_gradients(dense, wrapped)


@multi_world_sizes
def test_hooks_have_the_gradient(world_size: int) -> None:
    run_ranks(world_size, _uses_of_hooks)
