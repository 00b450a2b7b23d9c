"""Small batches, [4 samples, 6 features] in fp64, different in every step and on every rank."""

from __future__ import annotations

import torch
import torch.distributed as dist

from tests.ranks import device


def batch(step: int, rank: int) -> tuple[torch.Tensor]:
    """One rank's arguments, on the CPU: what ``tests.parity.check_parity`` asks for."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    return (torch.randn(4, 6, generator=generator, dtype=torch.float64),)


def whole_batch(step: int) -> torch.Tensor:
    """All ranks' samples together."""
    return torch.cat([batch(step, rank)[0] for rank in range(dist.get_world_size())]).to(device())


def own_batch(step: int) -> torch.Tensor:
    """This rank's samples."""
    return batch(step, dist.get_rank())[0].to(device())
