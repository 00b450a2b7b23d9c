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

from rtp_wrap.streams import current_stream

#: Tags are positive 31-bit numbers in Gloo.
_TAG_MASK = 0x7FFFFFFF


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
            self._put_mean(gradient, mean, tag)
            return mean, None
        if ready is None:
            self._stream.wait_stream(current_stream(self._device))
        else:
            ready.wait(self._stream)
        # They may be dropped before that stream is done with them, by an exception for one.
        gradient.record_stream(self._stream)
        mean.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            self._put_mean(gradient, mean, tag)
            return mean, self._stream.record_event()

    def _put_mean(self, gradient: torch.Tensor, mean: torch.Tensor, tag: int) -> None:
        size = self._group.size()
        if gradient.itemsize < 4:  # a sum could overflow
            gradient.div_(size)
        if gradient.is_cuda:
            dist.all_reduce(gradient, group=self._group)
        else:
            self._exchange(gradient, tag & _TAG_MASK)
        if gradient.itemsize >= 4:
            gradient.div_(size)
        if mean is not gradient:
            mean.copy_(gradient)

    def _exchange(self, gradient: torch.Tensor, tag: int) -> None:
        """The sum of all replicas' in the place of this rank's, to the bit the same on all."""
        own = self._group.rank()
        parts = [gradient if rank == own else torch.empty_like(gradient) for rank in self._ranks]
        operations = []
        for rank in self._ranks:
            if rank != own:
                peer = dist.get_global_rank(self._group, rank)
                for move, values in ((dist.isend, gradient), (dist.irecv, parts[rank])):
                    operations.append(dist.P2POp(move, values, peer, self._group, tag))
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        total = parts[0] + parts[1]
        for part in parts[2:]:
            total += part
        gradient.copy_(total)

    @property
    def _ranks(self) -> range:
        return range(self._group.size())
