"""The default process group of a rank, and the device that the rank works on."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

GROUP_TIMEOUT = timedelta(seconds=60)

#: Whether torchrun (or torch.distributed.launch) started this process as one of its ranks.
LAUNCHED = {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= os.environ.keys()


def _device_type() -> str:
    # The device count comes from NVML, which leaves CUDA uninitialised in the parent.
    wanted = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    found = "cuda" if torch.cuda.device_count() >= wanted else "cpu"
    return os.environ.get("RTP_TEST_DEVICE", found)


#: "cuda" where there is a GPU for each rank, unless RTP_TEST_DEVICE=cpu asks for the CPU.
DEVICE_TYPE = _device_type()


def is_possible(world_size: int) -> bool:
    """Whether `world_size` ranks can be had here."""
    if LAUNCHED:
        return world_size == int(os.environ["WORLD_SIZE"])
    return DEVICE_TYPE == "cpu" or world_size <= torch.cuda.device_count()


#: The world sizes to test with.
WORLD_SIZES = (
    (int(os.environ["WORLD_SIZE"]),) if LAUNCHED else tuple(filter(is_possible, (1, 2, 3, 4)))
)


def device() -> torch.device:
    """The device of this rank."""
    if DEVICE_TYPE == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def join_group(store: Store, rank: int, world_size: int, local_rank: int) -> None:
    """Make this process a rank of the default process group, and choose its device."""
    if DEVICE_TYPE == "cpu":
        backend, device_id = "gloo", None
    else:
        torch.cuda.set_device(local_rank)
        backend, device_id = "cpu:gloo,cuda:nccl", device()
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=GROUP_TIMEOUT,
        device_id=device_id,
    )
