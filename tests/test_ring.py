"""Rings: found by key, shared by copies, gone with their model; several of them at a time."""

from __future__ import annotations

import gc
import pickle
import weakref
from copy import deepcopy
from typing import Any

import pytest

if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))

import torch
import torch.distributed as dist
from torch import nn

from rtp_wrap import RotatedTensorParallel, ShardingPolicy
from rtp_wrap.ring import Ring, _rings, resolve
from tests.parity import compare_gradients, compare_weights, sgd
from tests.ranks import all_world_sizes, device, run_ranks

ROTATE = ShardingPolicy(replicate_below=0)


def _wrap(build: Any = lambda: nn.Linear(6, 6), **wrap: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    dense = build().to(device(), torch.float64)
    wrap.setdefault("policy", ROTATE)
    return dense, RotatedTensorParallel(deepcopy(dense), **wrap)


def _ring(wrapped: Any) -> Ring:
    ring: Ring = wrapped.module._adoption.ring
    return ring


def _data(step: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    whole = torch.randn(2 * dist.get_world_size(), 6, generator=generator, dtype=torch.float64)
    whole = whole.to(device())
    return whole, whole.chunk(dist.get_world_size())[dist.get_rank()]


def _keys() -> str:
    _, wrapped = _wrap()
    ring = _ring(wrapped)
    assert resolve(ring.key) is ring
    assert _ring(deepcopy(wrapped)) is ring
    assert pickle.loads(pickle.dumps(ring)) is ring
    assert _ring(_wrap()[1]).key != ring.key
    with pytest.raises(RuntimeError, match=r"ring nowhere/0.*save its state_dict\(\) instead"):
        resolve("nowhere/0")
    return ring.key


@all_world_sizes
def test_a_ring_is_found_by_its_key_and_shared_by_copies(world_size: int) -> None:
    """A key is like no other, so that a pickle of another process finds none."""
    assert len(set(run_ranks(world_size, _keys))) == world_size


def _freed() -> None:
    _, wrapped = _wrap(lambda: nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), policy=None)
    loss = wrapped(_data()[1]).sum()
    loss.backward()
    optimizer = sgd(wrapped.parameters())
    optimizer.step()
    key, ring = _ring(wrapped).key, weakref.ref(_ring(wrapped))
    parameter = weakref.ref(wrapped[0].weight)
    del wrapped, loss, optimizer
    gc.collect()
    assert ring() is None, "the ring, with its staging and connection, outlives its model"
    assert parameter() is None
    assert key not in _rings
    # And what comes after is not disturbed.
    _, again = _wrap()
    again(_data()[1]).sum().backward()
    sgd(again.parameters()).step()


@all_world_sizes
def test_a_deleted_model_frees_its_ring(world_size: int) -> None:
    run_ranks(world_size, _freed)


def _interleaved() -> None:
    """Two models as in a GAN: one is trained through the other, then the other alone."""
    generators = _wrap(lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6)))
    critics = _wrap(lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1)))
    steps = [
        (generator, critic, sgd(generator.parameters()), sgd(critic.parameters()), index)
        for index, (generator, critic) in enumerate(zip(generators, critics, strict=True))
    ]
    for step in range(3):
        for generator, critic, generator_sgd, critic_sgd, index in steps:
            x = _data(step)[index]
            critic_sgd.zero_grad()
            fake = generator(x)
            (critic(fake.detach()).mean() - critic(x).mean()).backward()
            critic_sgd.step()
            generator_sgd.zero_grad()
            (-critic(fake).mean()).backward()
            generator_sgd.step()
        for dense, wrapped in (generators, critics):
            compare_gradients(dense, wrapped)
            compare_weights(dense, wrapped)


@all_world_sizes
def test_two_models_over_one_group_train_interleaved(world_size: int) -> None:
    run_ranks(world_size, _interleaved)


def _one_optimizer() -> None:
    first, second = _wrap(), _wrap()
    optimizers = [
        sgd([*first[index].parameters(), *second[index].parameters()]) for index in (0, 1)
    ]
    for index in (0, 1):
        x = _data()[index]
        (first[index](x) * second[index](x)).mean().backward()
        optimizers[index].step()
    compare_weights(*first)
    compare_weights(*second)


@all_world_sizes
def test_one_optimizer_may_have_the_parameters_of_several_models(world_size: int) -> None:
    run_ranks(world_size, _one_optimizer)


def _other_optimizers() -> None:
    """The global hooks leave alone what is not wrapped."""
    _wrap()
    plain = nn.Linear(3, 3)
    plain(torch.ones(1, 3)).sum().backward()
    before = plain.weight._version
    torch.optim.Adam(plain.parameters(), fused=True).step()
    assert plain.weight._version >= before


@all_world_sizes
def test_optimizers_of_other_models_are_left_alone(world_size: int) -> None:
    run_ranks(world_size, _other_optimizers)


def _converted() -> None:
    """Conversions and copies drop a parameter's attributes, and the optimizer's hooks need one."""
    for convert in (lambda m: m.double(), deepcopy, lambda m: m.float(), lambda m: m.to(device())):
        _, wrapped = _wrap()
        converted = convert(wrapped)
        x = _data()[1].to(next(converted.parameters()).dtype)
        optimizer = torch.optim.AdamW(converted.parameters(), fused=True)
        converted(x).sum().backward()
        y = converted(x)
        optimizer.step()
        with pytest.raises(RuntimeError, match="was written"):
            y.sum().backward()


@all_world_sizes
def test_optimizer_steps_are_seen_on_converted_and_copied_models(world_size: int) -> None:
    run_ranks(world_size, _converted)
