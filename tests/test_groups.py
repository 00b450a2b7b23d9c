"""Subgroups, meshes and slices of meshes: any set of ranks can share a model."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from itertools import islice
from typing import Any

import pytest

if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from rtp_wrap import Gather, Replicate, RotatedTensorParallel, ShardingPolicy
from tests.parity import compare_gradients, compare_weights, sgd
from tests.ranks import (
    DEVICE_TYPE,
    all_world_sizes,
    device,
    multi_world_sizes,
    replace_ranks,
    run_ranks,
)

POLICY = ShardingPolicy(rules={"2.weight": Gather(), "*.bias": Replicate()}, replicate_below=0)


def _train(
    group: dist.ProcessGroup | None, seed: int, mesh: DeviceMesh | None = None
) -> list[torch.Tensor]:
    """Parity within a group whose ranks share a model of their own; the final weights."""
    shared = mesh.get_group() if mesh is not None else group or dist.group.WORLD
    assert isinstance(shared, dist.ProcessGroup)
    torch.manual_seed(seed)
    dense = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 5))
    dense.to(device(), torch.float64)
    mine = deepcopy(dense)
    with torch.no_grad():
        for parameter in mine.parameters():
            parameter.add_(shared.rank())  # only the group's rank 0 has the right ones
    wrapped = RotatedTensorParallel(mine, group, mesh=mesh, policy=POLICY)
    optimizers = [sgd(dense.parameters()), sgd(wrapped.parameters())]
    for _ in range(3):
        whole = torch.randn(2 * shared.size(), 6, dtype=torch.float64, device=device())
        own = whole.chunk(shared.size())[shared.rank()]
        for model, x, optimizer in zip((dense, wrapped), (whole, own), optimizers, strict=True):
            optimizer.zero_grad()
            (model(x) - 0.5).square().mean().backward()
        compare_gradients(dense, wrapped)
        for optimizer in optimizers:
            optimizer.step()
        compare_weights(dense, wrapped)
    return [parameter.detach() for parameter in dense.parameters()]


def _run_unlike(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """For ranks that wrap unlike numbers of models."""
    try:
        return run_ranks(world_size, function, *args)
    finally:
        replace_ranks(world_size)


def _split(sizes: list[int]) -> list[torch.Tensor]:
    """Groups of consecutive ranks train at the same time, each its own model."""
    ranks = iter(range(sum(sizes)))
    groups = [dist.new_group(list(islice(ranks, size))) for size in sizes]
    for index, group in enumerate(groups):
        if isinstance(group, dist.ProcessGroup):
            weights = _train(group, seed=index)
            dist.destroy_process_group(group)
            return weights
    raise AssertionError("every rank is in a group")


@pytest.mark.parametrize("sizes", [[1, 1], [1, 2], [2, 1], [2, 2], [1, 3]], ids=str)
def test_subgroups_train_their_own_models_at_the_same_time(sizes: list[int]) -> None:
    results = _run_unlike(sum(sizes), _split, sizes)
    assert not torch.equal(results[0][0], results[-1][0]), "the groups had different models"


def _some(ranks: list[int]) -> None:
    group = dist.new_group(ranks)
    if dist.get_rank() in ranks:
        _train(group, seed=0)
        dist.destroy_process_group(group)
    else:
        with pytest.raises(ValueError, match="is not in the group: wrap on its ranks only"):
            RotatedTensorParallel(nn.Linear(2, 2), group)


@pytest.mark.parametrize(("world_size", "ranks"), [(3, [1, 2]), (3, [0, 2]), (4, [1, 3]), (4, [3])])
def test_ranks_of_a_group_need_not_be_all_nor_neighbours(world_size: int, ranks: list[int]) -> None:
    _run_unlike(world_size, _some, ranks)


def _unlike_memberships() -> None:
    """Ranks that belong to different numbers of groups can still share one."""
    groups = [dist.new_group(ranks) for ranks in ([0, 1], [0, 2], [0, 1, 2])]
    for seed, group in enumerate(groups):
        if isinstance(group, dist.ProcessGroup):
            _train(group, seed)
            dist.destroy_process_group(group)


def test_groups_may_overlap() -> None:
    _run_unlike(3, _unlike_memberships)


def _whole_mesh() -> None:
    _train(None, 0, init_device_mesh(DEVICE_TYPE, (dist.get_world_size(),)))
    _train(dist.group.WORLD, 0)


@all_world_sizes
def test_a_mesh_or_the_default_group_given_explicitly_works(world_size: int) -> None:
    run_ranks(world_size, _whole_mesh)


def _slice(shape: tuple[int, int]) -> list[torch.Tensor]:
    mesh = init_device_mesh(DEVICE_TYPE, shape, mesh_dim_names=("dp", "rtp"))
    return _train(None, mesh.get_local_rank("dp"), mesh["rtp"])


@pytest.mark.parametrize("shape", [(2, 1), (1, 2), (1, 3), (2, 2)], ids=str)
def test_a_slice_of_a_2d_mesh_works(shape: tuple[int, int]) -> None:
    results = run_ranks(shape[0] * shape[1], _slice, shape)
    if shape[0] > 1:
        assert not torch.equal(results[0][0], results[-1][0])


def _outer_slice() -> None:
    """Ranks of the outer dimension are not neighbours."""
    mesh = init_device_mesh(DEVICE_TYPE, (2, 2), mesh_dim_names=("rtp", "tp"))
    _train(None, mesh.get_local_rank("tp"), mesh["rtp"])


def test_the_outer_dimension_of_a_mesh_works_as_well() -> None:
    run_ranks(4, _outer_slice)


def _again() -> None:
    """Groups of the same ranks, one after the other and at the same time."""
    for seed in range(3):
        group = dist.new_group()
        assert group is not None
        _train(group, seed)
        _train(None, seed)
        dist.destroy_process_group(group)


@multi_world_sizes
def test_a_group_may_be_destroyed_and_another_of_its_ranks_used(world_size: int) -> None:
    run_ranks(world_size, _again)


def _outside_mesh() -> None:
    mesh = DeviceMesh(DEVICE_TYPE, [0])
    if dist.get_rank() == 0:
        _train(None, 0, mesh)
    else:
        with pytest.raises(ValueError, match="is not in the mesh: wrap on its ranks only"):
            RotatedTensorParallel(nn.Linear(2, 2), mesh=mesh)


@multi_world_sizes
def test_a_rank_outside_the_mesh_gets_an_error(world_size: int) -> None:
    run_ranks(world_size, _outside_mesh)


def _under_another_device(transport: str, inplace: bool) -> None:
    """A thread's current device need not be the model's: it is another one in a new thread."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5))
    dense.to(device(), torch.float64)
    policy = ShardingPolicy(transport=transport, replicate_below=0)
    wrapped = RotatedTensorParallel(deepcopy(dense), inplace=inplace, policy=policy)
    optimizers = [sgd(dense.parameters()), sgd(wrapped.parameters())]
    world_size, rank = dist.get_world_size(), dist.get_rank()
    for _ in range(2):
        ids = torch.randint(9, (world_size, 4), device=device())
        with torch.cuda.device((device().index + 1) % torch.cuda.device_count()):
            for model, x in ((dense, ids), (wrapped, ids[rank])):
                model(x).square().mean().backward()
            compare_gradients(dense, wrapped)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        compare_weights(dense, wrapped)


@pytest.mark.skipif(DEVICE_TYPE != "cuda", reason="CPUs are one device")
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("transport", ["peer", "ring"])
@multi_world_sizes
def test_the_current_device_may_be_another(world_size: int, transport: str, inplace: bool) -> None:
    run_ranks(world_size, _under_another_device, transport, inplace)
