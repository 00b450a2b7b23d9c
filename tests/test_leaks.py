"""What models with peers take of a machine: nobody else's, and nothing once they are deleted."""

from __future__ import annotations

import gc
import os
import threading
import time
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from rtp_wrap import RotatedTensorParallel, ShardingPolicy
from tests.data import own_batch, whole_batch
from tests.parity import compare_gradients, compare_weights, mean_square, sgd
from tests.ranks import DEVICE_TYPE, WORLD_SIZES, device, multi_world_sizes, run_ranks
from tests.ranks.burial import bury
from tests.rotated import mesh_of_rings

POLICY = ShardingPolicy(replicate_below=0, transport="peer")
MIB = 2**20

on_gpus = pytest.mark.skipif(DEVICE_TYPE != "cuda", reason="of the memory of GPUs")
alone = pytest.mark.skipif(
    "PYTEST_XDIST_WORKER" in os.environ, reason="of the free memory of GPUs that other tests use"
)
on_cpus = pytest.mark.skipif(DEVICE_TYPE != "cpu", reason="of memory that processes share")


def _two_groups() -> None:
    """Two models, each with a group of its own, whose passes are nested in each other."""
    everyone = dist.new_group(list(range(dist.get_world_size())))
    pairs = []
    for seed, group in enumerate((None, everyone)):
        torch.manual_seed(seed)
        dense = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5))
        dense.to(device(), torch.float64)
        wrapped = RotatedTensorParallel(deepcopy(dense), group, policy=POLICY)
        assert wrapped.transport == "peer"
        pairs.append((dense, wrapped, sgd(dense.parameters()), sgd(wrapped.parameters())))
    for step in range(3):
        losses = [mean_square(wrapped(own_batch(step))) for _, wrapped, *_ in pairs]
        for loss in losses:
            loss.backward()
        for dense, wrapped, *optimizers in pairs:
            mean_square(dense(whole_batch(step))).backward()
            compare_gradients(dense, wrapped, when=f"step {step}")
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            compare_weights(dense, wrapped, when=f"step {step}")
    del pairs, dense, wrapped, optimizers, optimizer, losses, loss
    gc.collect()
    dist.destroy_process_group(everyone)


@multi_world_sizes
def test_two_groups_have_a_model_each(world_size: int) -> None:
    run_ranks(world_size, _two_groups)


def _wrapped(mesh: DeviceMesh | None = None) -> RotatedTensorParallel:
    """In fp32, with slots for 8 MiB of weights."""
    dense = nn.Sequential(nn.Linear(1024, 2048), nn.Tanh(), nn.Linear(2048, 1024))
    return RotatedTensorParallel(dense, mesh=mesh, policy=ShardingPolicy(transport="peer"))


def _train(model: nn.Module, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters())
    x = torch.ones(4, 1024, device=device())
    for _ in range(steps):
        mean_square(model(x)).backward()
        optimizer.step()
        optimizer.zero_grad()


def _taken() -> dict[str, int]:
    """What this process has of things that are to be given back."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    return {
        "mapped files": sum("/rtp-" in line for line in maps),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
    }


def _settled() -> dict[str, int]:
    """The same when it has stayed so: connections and threads end a moment after their owner."""
    gc.collect()
    bury()
    dist.barrier()
    taken, deadline = {}, time.monotonic() + 10
    while taken != (now := _taken()) and time.monotonic() < deadline:
        taken = now
        time.sleep(0.2)
    return now


def _come_and_go(rings: int) -> None:
    ranks = dist.get_world_size() // rings
    mesh = mesh_of_rings(rings) if rings > 1 else None
    _train(_wrapped(mesh), steps=1)  # what torch itself takes at first, and earlier tests have left
    before = _settled()
    for _ in range(3):
        model = _wrapped(mesh)
        _train(model, steps=2)
        during = _taken()
        assert during["mapped files"] == before["mapped files"] + ranks, (during, before)
        del model
        after = _settled()
        # Fewer, where something of an earlier test is gone only now.
        assert all(after[what] <= before[what] for what in after), (after, before)
        before = after


@on_cpus
@multi_world_sizes
def test_deleted_models_leave_no_files_connections_or_threads(world_size: int) -> None:
    run_ranks(world_size, _come_and_go, 1)


@on_cpus
@pytest.mark.skipif(4 not in WORLD_SIZES, reason="needs four ranks")
def test_nor_do_models_of_two_rings() -> None:
    run_ranks(4, _come_and_go, 2)


def _free_memory() -> list[int]:
    """Of this rank's GPU, in bytes, after each of some models has come and gone."""
    free = []
    for _ in range(5):
        threads = set(threading.enumerate())
        before, allocated = torch.cuda.mem_get_info()[0], torch.cuda.memory_allocated()
        model = _wrapped()
        watchdogs = [each for each in threading.enumerate() if each not in threads]
        assert len(watchdogs) == 1
        assert torch.cuda.mem_get_info()[0] <= before - model.staging_bytes
        # As `RotatedTensorParallel.transport` says, it is not the allocator's.
        assert torch.cuda.memory_allocated() - allocated < model.staging_bytes
        _train(model, steps=3)
        del model
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        dist.barrier()  # memory is free when no rank has it mapped any more
        torch.cuda.synchronize()
        free.append(torch.cuda.mem_get_info()[0])
        dist.barrier()
        watchdogs[0].join(timeout=5)  # it looks once a second whether it is still needed
        assert not watchdogs[0].is_alive()
    return free


@on_gpus
@alone
@multi_world_sizes
def test_deleted_models_give_their_staging_back(world_size: int) -> None:
    """After the second one libraries have all that they ever take; a staging is 56 MiB here."""
    for free in run_ranks(world_size, _free_memory):
        assert free[4] == pytest.approx(free[1], abs=8 * MIB)


def _reserved() -> tuple[int, int, int]:
    """Peaks in bytes: reserved after 20 steps and after 200, and allocated."""
    layers = [module for _ in range(6) for module in (nn.Linear(1024, 1024), nn.GELU())]
    model = RotatedTensorParallel(nn.Sequential(*layers), policy=ShardingPolicy(transport="peer"))
    optimizer = torch.optim.AdamW(model.parameters())
    x = torch.randn(512, 1024, device=device())
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    early = 0
    for step in range(200):  # nothing waits for the device, so the host runs ahead
        mean_square(model(x)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 19:
            early = torch.cuda.max_memory_reserved()
    return early, torch.cuda.max_memory_reserved(), torch.cuda.max_memory_allocated()


@on_gpus
@multi_world_sizes
def test_the_allocator_reserves_no_more_and_more(world_size: int) -> None:
    """Memory that two streams use is free only when both are done with it.

    Autograd's thread lets go of a graph when it comes to it, by which time the next step may have
    taken a block more, of a segment of 20 MiB: so a few of these may come late where the GPU is
    busy with something else. A block of 4 MiB that every step loses would be 720 MiB.
    """
    for early, late, allocated in run_ranks(world_size, _reserved):
        assert late <= early + 4 * 20 * MIB
        assert late < 1.5 * allocated + 64 * MIB  # blocks are rounded up to a few MiB
