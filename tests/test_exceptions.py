"""Exceptions inside a rotation: on all ranks a good step follows, on one rank all get an error."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest

if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))

import torch
import torch.distributed as dist
from torch import nn

from rtp_wrap import Gather, OutOfStepError, Replicate, RotatedTensorParallel, ShardingPolicy
from rtp_wrap.ops import linear
from tests.parity import FP64, compare_gradients, compare_weights, sgd
from tests.ranks import DEVICE_TYPE, device, multi_world_sizes, run_ranks

# Only rotations communicate in forward: collectives of other sizes would abort in Gloo itself.
ROTATE = ShardingPolicy(rules={"*.bias": Replicate()}, replicate_below=0)
#: Seconds: what the group allows a rank to wait for another.
TIMEOUT = 2.0

cpu_only = pytest.mark.skipif(
    DEVICE_TYPE == "cuda", reason="NCCL ends the process of a rank that waits too long"
)


class InjectedError(RuntimeError):
    pass


@contextmanager
def before_products(call: Callable[[], None]) -> Iterator[None]:
    """``call`` comes before every matrix product of a rotation: one for every tile or layer."""

    def behind(product: Any) -> Any:
        def run(*args: Any) -> None:
            call()
            product(*args)

        return run if product is not None else None

    forward, backward = linear.rotate_forward, linear.rotate_backward

    def rotate_forward(*args: Any) -> None:
        *others, product = args
        forward(*others, behind(product))

    def rotate_backward(*args: Any) -> Any:
        *others, dgrad, wgrad = args
        return backward(*others, behind(dgrad), behind(wgrad))

    with (
        mock.patch.object(linear, "rotate_forward", rotate_forward),
        mock.patch.object(linear, "rotate_backward", rotate_backward),
    ):
        yield


@contextmanager
def failing_product(number: int) -> Iterator[None]:
    """The matrix product with this number (from 0), inside a rotation, raises."""
    calls = itertools.count()

    def fail() -> None:
        if next(calls) == number:
            raise InjectedError(f"product {number}")

    with before_products(fail):
        yield


def products_of_a_forward(model: nn.Module, x: torch.Tensor) -> int:
    """How many there are."""
    calls = itertools.count()

    def count() -> None:
        next(calls)

    with before_products(count):
        model(x)
    return next(calls)


def _build() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 7))


def _pair(policy: ShardingPolicy = ROTATE, **wrap: Any) -> tuple[nn.Module, RotatedTensorParallel]:
    torch.manual_seed(0)
    dense = _build().to(device(), torch.float64)
    return dense, RotatedTensorParallel(deepcopy(dense), policy=policy, **wrap)


def _data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    whole = torch.randn(2 * dist.get_world_size(), 6, generator=generator, dtype=torch.float64)
    whole = whole.to(device())
    return whole, whole.chunk(dist.get_world_size())[dist.get_rank()]


def _train(model: nn.Module, x: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(x).square().mean().backward()


def _good_step(
    models: tuple[nn.Module, RotatedTensorParallel],
    batches: tuple[torch.Tensor, torch.Tensor],
    optimizers: list[torch.optim.Optimizer],
    when: str,
) -> None:
    """Of the dense model with the whole batch and of the wrapped one with this rank's: alike."""
    for model, x, optimizer in zip(models, batches, optimizers, strict=True):
        _train(model, x, optimizer)
    compare_gradients(*models, FP64, when)
    for optimizer in optimizers:
        optimizer.step()
    compare_weights(*models, FP64, when)


def _on_all_ranks() -> None:
    whole, own = _data()
    for inplace in (False, True):
        dense, wrapped = _pair(inplace=inplace)
        optimizers = [sgd(dense.parameters()), sgd(wrapped.parameters())]
        forward = products_of_a_forward(wrapped, own)
        layer = forward // 3
        # The first and the last product of a rotation, and some within; forward and backward.
        for number in (0, layer - 1, layer + 1, forward, forward + 1, forward + 3):
            with failing_product(number), pytest.raises(InjectedError):
                _train(wrapped, own, optimizers[1])
            _good_step((dense, wrapped), (whole, own), optimizers, f"product {number}")


@multi_world_sizes
def test_an_exception_on_all_ranks_is_followed_by_a_good_step(world_size: int) -> None:
    run_ranks(world_size, _on_all_ranks)


def _at_different_places() -> None:
    """Rank 0 raises before the parts of a cell have a place in the staging, the others after it."""
    whole, own = _data()
    # Seven slots, each of which any layer fills.
    policy = replace(ROTATE, transport="peer", staging_bytes=7 * 640)
    dense, wrapped = _pair(policy)
    assert wrapped.transport == "peer"
    optimizers = [sgd(dense.parameters()), sgd(wrapped.parameters())]
    forward = products_of_a_forward(wrapped, own)
    number = forward if dist.get_rank() == 0 else forward + forward // 3
    for step in range(3):
        with failing_product(number), pytest.raises(InjectedError):
            _train(wrapped, own, optimizers[1])
        for again in range(2):
            _good_step((dense, wrapped), (whole, own), optimizers, f"step {step}, {again}")


@multi_world_sizes
def test_exceptions_at_different_places_are_followed_by_good_steps(world_size: int) -> None:
    run_ranks(world_size, _at_different_places)


def _outside() -> None:
    """An exception on all ranks between rotations, and one for a wrong shape before any."""
    whole, own = _data()
    dense, wrapped = _pair()
    optimizers = [sgd(dense.parameters()), sgd(wrapped.parameters())]

    def fail(*_: Any) -> None:
        raise InjectedError

    hook = wrapped.module.get_submodule("2").register_forward_hook(fail)
    with pytest.raises(InjectedError):
        wrapped(own)
    hook.remove()
    with pytest.raises(ValueError, match="input features"):
        wrapped(own[:, :5])
    with pytest.raises(TypeError, match="float32"):
        wrapped(own.float())
    y = wrapped(own)
    y.register_hook(fail)
    with pytest.raises(InjectedError):
        y.sum().backward()
    _good_step((dense, wrapped), (whole, own), optimizers, "after all of them")


@multi_world_sizes
def test_exceptions_between_rotations_are_followed_by_a_good_step(world_size: int) -> None:
    run_ranks(world_size, _outside)


def _on_one_rank(where: str, inplace: bool, failing: int) -> tuple[float, list[str]]:
    """How long the first error took, and the kinds of all errors, in a loop that goes on."""
    group = dist.new_group(timeout=timedelta(seconds=TIMEOUT))
    _, wrapped = _pair(group=group, inplace=inplace)
    own = _data()[1]
    optimizer = sgd(wrapped.parameters())
    _train(wrapped, own, optimizer)
    optimizer.step()  # all is well so far
    before = [p._local_tensor.clone() for p in wrapped.parameters()]  # type: ignore[attr-defined]
    forward = products_of_a_forward(wrapped, own)
    number = 1 + (forward // 3 if where == "forward" else forward)
    errors: list[str] = []
    first = time.monotonic()
    for step in range(3):
        started = time.monotonic()
        faulty = step == 0 and dist.get_rank() == failing
        try:
            with failing_product(number if faulty else -1):
                _train(wrapped, own, optimizer)
            optimizer.step()
            errors.append("none")
        except RuntimeError as error:
            errors.append(type(error).__name__)
            if step == 0:
                first = time.monotonic() - started
    for parameter, value in zip(wrapped.parameters(), before, strict=True):
        local = parameter._local_tensor  # type: ignore[attr-defined]
        assert torch.equal(local, value), "weights were changed by a step with an error"
    dist.destroy_process_group(group)
    return first, errors


@cpu_only
@pytest.mark.parametrize(
    ("world_size", "where", "inplace"),
    [
        (2, "backward", False),
        (3, "forward", False),
        (3, "forward", True),
        (3, "backward", False),
        (3, "backward", True),
        (4, "forward", False),
    ],
)
def test_an_exception_on_one_rank_is_an_error_on_the_others_in_time(
    world_size: int, where: str, inplace: bool
) -> None:
    outcomes = run_ranks(world_size, _on_one_rank, where, inplace, world_size - 1)
    # The rank that raised does not touch the ring again before all ranks have compared; NCCL, which
    # ignores tags, would pair its hops with those of another layer.
    assert outcomes[-1][1][:2] == ["InjectedError", "OutOfStepError"]
    for rank, (first, errors) in enumerate(outcomes):
        assert "none" not in errors, f"rank {rank} had {errors}: it went on as if all were well"
        # The wait for a hop, and after it at most one for the comparison; the rest is load.
        assert first < 2 * TIMEOUT + 5, f"rank {rank} waited {first:.1f} s"


def _caught_outside(skip: int, policy: ShardingPolicy) -> str:
    """One rank leaves a forward between two layers, and goes on with the next step."""
    group = dist.new_group(timeout=timedelta(seconds=TIMEOUT))
    _, wrapped = _pair(policy, group=group)
    own = _data()[1]
    optimizer = sgd(wrapped.parameters())
    before = [p._local_tensor.clone() for p in wrapped.parameters()]  # type: ignore[attr-defined]

    def fail(*_: Any) -> None:
        raise InjectedError

    if dist.get_rank() == skip:
        hook = wrapped.module.get_submodule("2").register_forward_hook(fail)
        with pytest.raises(InjectedError):
            _train(wrapped, own, optimizer)
        hook.remove()
    try:
        _train(wrapped, own, optimizer)
        optimizer.step()
        message = ""
    except (OutOfStepError, RuntimeError) as error:
        message = str(error)
    for parameter, value in zip(wrapped.parameters(), before, strict=True):
        assert torch.equal(parameter._local_tensor, value)  # type: ignore[attr-defined]
    dist.destroy_process_group(group)
    return message


@cpu_only
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize(
    "policy", [ROTATE, ShardingPolicy(rules={"*": Gather()})], ids=["rotated", "gathered"]
)
def test_a_rank_that_leaves_a_step_between_layers_is_an_error_everywhere(
    world_size: int, policy: ShardingPolicy
) -> None:
    for message in run_ranks(world_size, _caught_outside, 0, policy):
        assert message, "a rank went on as if all were well"
