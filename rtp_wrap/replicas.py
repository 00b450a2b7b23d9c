"""Averages of gradients over the rings of a 2-D mesh, which have the same shards.

With R rings of N ranks, a gradient is first averaged over the N ranks of a ring, as ever, and then
each rank averages what it owns of it, 1/N, with the R - 1 others that own the same. That comes to
the average over all R N ranks.

On GPUs it is one all-reduce, on a stream beside the computation. On CPUs ranks send each other what
they have, with tags: Gloo's all-reduce has none, and ends the process where sizes differ, which is
how ranks that are out of step would meet.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from rtp_wrap.rings import put_mean
from rtp_wrap.streams import current_stream
from rtp_wrap.transport.p2p import TAG_MASK


class Replicas:
    """The ranks of ``group``, whose home shards lie on ``device``.

    ``overlap=False`` averages on the stream of the computation.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, *, overlap: bool) -> None:
        self._group, self._device = group, device
        concurrent = overlap and device.type == "cuda"
        self._stream = torch.cuda.Stream(device, priority=-1) if concurrent else None

    def average(
        self,
        gradient: torch.Tensor,
        dtype: torch.dtype,
        ready: torch.cuda.Event | None,
        tag: int,
    ) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        """The mean of all replicas' ``gradient``, as ``dtype``, and when it is there.

        It is summed in the dtype of ``gradient``, which is overwritten. That of this rank is there
        when it is ``ready``; for ``None``, when the current stream's work is done. All replicas
        call this in the same order, with the same ``tag``, at least 0.
        """
        # In memory of the current stream, where it will be read.
        mean = gradient if gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype)
        if not gradient.numel():  # nor have the others anything
            return mean, ready
        if self._stream is None:
            if ready is not None:
                ready.wait(current_stream(self._device))
            self._reduce(gradient, mean, tag)
            return mean, None
        if ready is None:
            self._stream.wait_stream(current_stream(self._device))
        else:
            ready.wait(self._stream)
        # They may be dropped before that stream is done with them, by an exception for one.
        gradient.record_stream(self._stream)
        mean.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            self._reduce(gradient, mean, tag)
            return mean, self._stream.record_event()

    def _reduce(self, gradient: torch.Tensor, mean: torch.Tensor, tag: int) -> None:
        put_mean(gradient, self._group.size(), lambda: self._put_sum(gradient, tag))
        if mean is not gradient:
            mean.copy_(gradient)

    def _put_sum(self, gradient: torch.Tensor, tag: int) -> None:
        """To the bit the same on all: on CPUs each rank adds up in the order of ranks."""
        if gradient.is_cuda:
            dist.all_reduce(gradient, group=self._group)
            return
        parts = [torch.empty_like(gradient) for _ in range(self._group.size())]
        parts[self._group.rank()] = gradient.clone()
        operations = []
        for rank, part in enumerate(parts):
            if rank != self._group.rank():
                peer = dist.get_global_rank(self._group, rank)
                for move, values in ((dist.isend, gradient), (dist.irecv, part)):
                    operations.append(dist.P2POp(move, values, peer, self._group, tag & TAG_MASK))
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        gradient.zero_()
        for part in parts:
            gradient += part
