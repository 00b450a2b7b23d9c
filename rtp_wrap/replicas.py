"""The ranks that have the same home shards as this one: one of each ring of a 2-D mesh.

With R rings of N ranks, a gradient is first averaged over the N ranks of a ring, as ever, and then
each rank averages what it owns of it, 1/N, with the R - 1 others that own the same: one all-reduce.
It comes to the average over all R * N ranks.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from rtp_wrap.streams import current_stream


class Replicas:
    """The ranks of ``group``, whose home shards lie on ``device``.

    On a GPU, if this is to ``overlap`` with the computation, they have a stream for it.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, *, overlap: bool) -> None:
        self._group, self._device = group, device
        concurrent = overlap and device.type == "cuda"
        self._stream = torch.cuda.Stream(device, priority=-1) if concurrent else None

    def average(
        self, gradient: torch.Tensor, sums: torch.dtype, ready: torch.cuda.Event | None
    ) -> torch.cuda.Event | None:
        """Put the mean of all replicas' ``gradient`` in its place, summed in ``sums``.

        That of this rank is there when it is ``ready``; for ``None``, when the current stream's
        work is done. Returns the same of the mean. All replicas call this in the same order.
        """
        if not gradient.numel():  # nor have the others anything
            return ready
        stream = self._stream
        if stream is None:
            if ready is not None:
                ready.wait(current_stream(self._device))
            self._average(gradient, sums)
            return None
        if ready is None:
            stream.wait_stream(current_stream(self._device))
        else:
            ready.wait(stream)
        # It may be dropped before that stream is done with it, by an exception for one.
        gradient.record_stream(stream)
        with torch.cuda.stream(stream):
            self._average(gradient, sums)
            return stream.record_event()

    def _average(self, gradient: torch.Tensor, sums: torch.dtype) -> None:
        total = gradient.to(sums)
        average_over(self._group, total)
        if total is not gradient:
            gradient.copy_(total)


def average_over(group: dist.ProcessGroup, values: torch.Tensor) -> None:
    """Put the mean of all ranks' ``values`` in their place, summed in their dtype."""
    size = group.size()
    if size == 1:
        return
    before = size if values.itemsize < 4 else 1  # where a sum could overflow
    dist.all_reduce(values.div_(before), group=group)
    values.div_(size // before)
