"""Point-to-point ring over ``torch.distributed``: NCCL between GPUs, Gloo between CPUs."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist

#: Of a tag that others are counted on from: Gloo's are positive 31-bit numbers.
TAG_MASK = 0x3FFFFFFF


class PointToPoint:
    """Moves buffers one rank down the ring: to rank - 1, from rank + 1."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        rank, world_size = group.rank(), group.size()
        self._group = group
        self._below = dist.get_global_rank(group, (rank - 1) % world_size)
        self._above = dist.get_global_rank(group, (rank + 1) % world_size)

    def post(self, hops: Iterable[tuple[torch.Tensor, torch.Tensor]], tag: int) -> list[dist.Work]:
        """Start all ``(outgoing, incoming)`` hops together, and return what to wait for.

        Buffers are contiguous; an empty one is not sent (both ends know the sizes). ``tag`` (at
        least 0) tells this set of hops from others where the backend knows tags; each hop of the
        set counts on from it. On CUDA the hops start after the work already queued on the current
        stream.
        """
        operations = []
        for lane, (outgoing, incoming) in enumerate(hops):
            for move, buffer, peer in (
                (dist.isend, outgoing, self._below),
                (dist.irecv, incoming, self._above),
            ):
                if buffer.numel():
                    operations.append(dist.P2POp(move, buffer, peer, self._group, tag + lane))
        return dist.batch_isend_irecv(operations) if operations else []
