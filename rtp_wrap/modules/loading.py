"""Loading a dense model's tensors into home shards."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor, Shard

from rtp_wrap.ring import Ring
from rtp_wrap.shard import dtensor_of, extent


def own_part(whole: torch.Tensor, parameter: DTensor, ring: Ring) -> DTensor:
    """This rank's part of ``whole``, laid out as ``parameter``; nothing is communicated.

    Copied out, so that of a memory-mapped checkpoint each rank reads what it owns.
    """
    placement = parameter.placements[-1]
    part = whole.detach()
    if isinstance(placement, Shard):
        start, stop = extent(whole.shape[placement.dim], ring.world_size, ring.rank)
        part = part.narrow(placement.dim, start, stop - start)
    local = part.to(ring.device, copy=True, memory_format=torch.contiguous_format)
    return dtensor_of(local, parameter.device_mesh, parameter.placements, whole.shape)
