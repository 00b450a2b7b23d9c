"""Gradients of rotated weights on their way from the averages to ``.grad``."""

from __future__ import annotations

import functools
import gc
import itertools
import weakref
from collections.abc import Callable
from copy import deepcopy
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.func import functional_call

from rtp_wrap import Gather, RotatedTensorParallel, ShardingPolicy
from rtp_wrap.gradient import SITES_BETWEEN
from rtp_wrap.ops import pull
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


def _pair(
    build: Callable[[], nn.Module], transport: str = "peer"
) -> tuple[Any, RotatedTensorParallel, torch.Tensor]:
    """A model, the same wrapped, and a batch ``[ranks, 2, WIDTH]``, alike on all ranks."""
    torch.manual_seed(0)
    dense = build().to(device(), torch.float64)
    policy = ShardingPolicy(replicate_below=0, transport=transport)
    wrapped = RotatedTensorParallel(deepcopy(dense), policy=policy)
    batch = torch.randn(dist.get_world_size(), 2, WIDTH).to(device(), torch.float64)
    return dense, wrapped, batch


def _present_in_backwards() -> list[list[int]]:
    """Which weights have a gradient when the backward of each layer begins."""
    policy = ShardingPolicy(replicate_below=0, transport="peer")
    wrapped = RotatedTensorParallel(Chain(SITES_BETWEEN + 4).to(device()), policy=policy)
    weights = list(wrapped.parameters())
    present: list[list[int]] = []

    def backward(*args: Any) -> Any:
        present.append([i for i, weight in enumerate(weights) if weight.grad is not None])
        return original(*args)

    original = pull.backward
    with patch.object(pull, "backward", backward):
        wrapped(torch.randn(2, WIDTH, device=device())).sum().backward()
    assert all(weight.grad is not None for weight in weights)
    return present


@multi_world_sizes
def test_a_gradient_arrives_some_layers_later(world_size: int) -> None:
    """There the computation waits for the average: not before others' products have begun."""
    depth = SITES_BETWEEN + 4
    for present in run_ranks(world_size, _present_in_backwards):
        # The last layer is the first one. And not much later: gradients would pile up.
        arrived = [list(range(layer + SITES_BETWEEN + 1, depth)) for layer in range(depth)]
        assert present == arrived[::-1]


def _order_of_hooks() -> list[int]:
    policy = ShardingPolicy(replicate_below=0, transport="peer")
    wrapped = RotatedTensorParallel(Chain(SITES_BETWEEN + 4).to(device()), policy=policy)
    seen: list[int] = []

    def see(index: int, gradient: torch.Tensor) -> None:
        assert gradient.shape == (WIDTH, WIDTH)
        seen.append(index)

    for index, weight in enumerate(wrapped.parameters()):
        weight.register_hook(functools.partial(see, index))
    other = torch.ones(1, requires_grad=True)
    for _ in range(5 * dist.get_rank()):  # ranks have made unlike numbers of nodes
        other = other * 1
    wrapped(torch.randn(2, WIDTH, device=device())).sum().backward()
    return seen


@multi_world_sizes
def test_ranks_take_gradients_in_one_order(world_size: int) -> None:
    """Hooks may communicate, and so does an optimizer's step in one."""
    for seen in run_ranks(world_size, _order_of_hooks):
        assert seen == list(reversed(range(SITES_BETWEEN + 4)))


def _nested(transport: str) -> None:
    """A hook has another loss's gradients while those of weights are on their way."""
    dense, wrapped, batch = _pair(lambda: Chain(SITES_BETWEEN + 3), transport)
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


def _complete_when_it_returns() -> None:
    """A hook runs another backward, and has its gradients then."""
    dense, wrapped, batch = _pair(lambda: nn.ModuleList([Chain(2), Chain(2)]))
    mean_square(dense[1](batch.flatten(0, 1))).backward()
    x = batch[dist.get_rank()]
    outer, inner = wrapped.module.children()  # type: ignore[operator]
    loss, compared = mean_square(inner(x)), []

    def hook(gradient: torch.Tensor) -> None:
        loss.backward()
        for (name, weight), whole in zip(
            inner.named_parameters(), dense[1].parameters(), strict=True
        ):
            assert whole.grad is not None
            torch.testing.assert_close(full(weight.grad), whole.grad)  # type: ignore[arg-type]
            compared.append(name)

    y = outer[0](x)
    y.register_hook(hook)
    mean_square(outer[1](y)).backward()
    assert len(compared) == 2


@multi_world_sizes
def test_a_backward_is_complete_when_it_returns(world_size: int) -> None:
    run_ranks(world_size, _complete_when_it_returns)


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
    dense, wrapped, batch = _pair(lambda: Chain(3))
    for parameter in itertools.chain(dense.parameters(), wrapped.parameters()):
        parameter.register_hook(lambda gradient: gradient * 2)
        parameter.register_post_accumulate_grad_hook(_triple)
    with patch.object(peer, "put_mean", functools.partial(_put_late, peer.put_mean)):
        mean_square(dense(batch.flatten(0, 1))).backward()
        mean_square(wrapped(batch[dist.get_rank()])).backward()
        compare_gradients(dense, wrapped)


@multi_world_sizes
def test_hooks_have_the_gradient(world_size: int) -> None:
    run_ranks(world_size, _uses_of_hooks)


def _hooks_and_a_penalty() -> None:
    """A hook that steps has the whole gradient, once, whatever else there is of it."""
    dense, wrapped, batch = _pair(lambda: Chain(3))
    stepped: list[int] = []

    def step(parameter: torch.Tensor) -> None:
        stepped.append(id(parameter))
        with torch.no_grad():
            parameter.sub_(parameter.grad, alpha=0.1)  # type: ignore[arg-type]
        parameter.grad = None

    for parameter in itertools.chain(dense.parameters(), wrapped.parameters()):
        parameter.register_post_accumulate_grad_hook(step)
    for model, x in ((dense, batch.flatten(0, 1)), (wrapped, batch[dist.get_rank()])):
        (mean_square(model(x)) + _penalty(model)).backward()
    compare_weights(dense, wrapped)
    assert len(stepped) == len(set(stepped)) == 6


@multi_world_sizes
def test_hooks_that_step_are_called_once(world_size: int) -> None:
    run_ranks(world_size, _hooks_and_a_penalty)


def _gradients_that_are_there() -> None:
    """Gradients are added in place, as autograd does, to what the user has put there, too."""
    dense, wrapped, batch = _pair(lambda: Chain(3))
    pairs = list(zip(dense.parameters(), wrapped.parameters(), strict=True))
    there: list[Any] = []
    for (whole, weight), other in zip(pairs, (None, [Shard(0)], [Replicate()]), strict=True):
        if other is not None:
            whole.grad = torch.randn_like(whole)
            weight.grad = distribute_tensor(whole.grad, weight.device_mesh, other)  # type: ignore[attr-defined]
        there.append(weight.grad)
    for _ in range(2):
        mean_square(dense(batch.flatten(0, 1))).backward()
        mean_square(wrapped(batch[dist.get_rank()])).backward()
        for (_, weight), before in zip(pairs, there, strict=True):
            assert before is None or weight.grad is before
        there = [weight.grad for _, weight in pairs]
    for whole, weight in pairs:
        assert whole.grad is not None
        torch.testing.assert_close(full(weight.grad), whole.grad)


@multi_world_sizes
def test_gradients_are_added_to_those_that_are_there(world_size: int) -> None:
    run_ranks(world_size, _gradients_that_are_there)


def _alike() -> None:
    """Two weights' gradients of a penalty are one tensor, which is only what each of them gains."""
    dense, wrapped, batch = _pair(lambda: Chain(SITES_BETWEEN + 3))
    for model, x in ((dense, batch.flatten(0, 1)), (wrapped, batch[dist.get_rank()])):
        loss = mean_square(model(x))  # first, so that autograd comes to the penalty first
        # Of this rank's own parts: each is a DTensor's, and what they share cannot be seen there.
        first, *_, last = (
            weight.to_local() if isinstance(weight, DTensor) else weight
            for weight in model.parameters()
        )
        (loss + (first + last).square().sum()).backward()
    compare_gradients(dense, wrapped)


@multi_world_sizes
def test_gradients_that_share_memory_are_not_added_to(world_size: int) -> None:
    run_ranks(world_size, _alike)


def _weights_of_others() -> None:
    """A weight that was computed has no ``.grad``: its gradient goes on to what it is made of."""
    torch.manual_seed(0)
    dense = nn.Linear(WIDTH, WIDTH, bias=False).to(device(), torch.float64)
    policy = ShardingPolicy(replicate_below=0, transport="peer")
    wrapped = RotatedTensorParallel(nn.Sequential(deepcopy(dense)), policy=policy)
    batch = torch.randn(dist.get_world_size(), 2, WIDTH).to(device(), torch.float64)
    mean_square(
        functional_call(dense, {"weight": dense.weight * 2}, batch.flatten(0, 1))
    ).backward()
    (weight,) = wrapped.parameters()
    inner = wrapped.module[0]  # type: ignore[index]
    y = functional_call(inner, {"weight": weight * 2}, batch[dist.get_rank()])
    mean_square(y).backward()
    assert dense.weight.grad is not None
    torch.testing.assert_close(full(weight.grad), dense.weight.grad)  # type: ignore[arg-type]


@multi_world_sizes
def test_a_weight_may_be_computed(world_size: int) -> None:
    run_ranks(world_size, _weights_of_others)


class _Refused(Exception):
    pass


def _interrupted() -> None:
    """What was on its way when a backward raised is gone with it, also from memory."""
    policy = ShardingPolicy(replicate_below=0, transport="peer")
    wrapped = RotatedTensorParallel(Chain(3).to(device()), policy=policy)
    kept = weakref.ref(wrapped.module[2].weight)  # type: ignore[index, union-attr]

    def refuse(gradient: torch.Tensor) -> None:
        raise _Refused

    x = torch.randn(2, WIDTH, device=device(), requires_grad=True)
    y = wrapped.module[1](wrapped.module[0](x))  # type: ignore[index, operator]
    y.register_hook(refuse)
    with pytest.raises(_Refused):
        wrapped.module[2](y).sum().backward()  # type: ignore[index, operator]
    assert all(weight.grad is None for weight in wrapped.parameters())
    del y, wrapped
    gc.collect()
    assert kept() is None


@multi_world_sizes
def test_gradients_of_a_backward_that_raises_are_gone(world_size: int) -> None:
    run_ranks(world_size, _interrupted)
