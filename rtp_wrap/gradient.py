"""Averaged gradients on their way to ``.grad``.

A rotation's backward computes the gradients of the input and of the weight, but the latter may be
finished later, beside the computation (see ``transport.peer``), which has to wait for it before
anybody takes it. Waiting at once would stop the computation at every layer. So where a gradient
goes to ``.grad`` and nobody looks on, it is put there a few layers later: by then it has come, or
almost, and waiting for it takes the device no time. At the end of a backward all have arrived.

Autograd's own way is left to gradients that somebody wants to see, hooks and
``torch.autograd.grad``: the computation waits for these. It takes the host longer, for it detaches
a DTensor first. FSDP2 does not go that way either.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from typing import Any, NamedTuple

import torch
from torch.distributed.tensor import DTensor

from rtp_wrap.engine import at_its_end, only_accumulates, running_backward
from rtp_wrap.streams import current_stream

#: So far, in layers, the computation is ahead of the averages at the most, where layers fill a slot
#: of the staging; with smaller layers it can be further ahead, and may have to wait.
SITES_BETWEEN = 3


class Gradient(NamedTuple):
    """An averaged gradient, which is there when ``ready`` is; ``None`` if it is there.

    One that ``comes_late`` is averaged between hosts as well: that may take many layers' time.
    """

    value: DTensor
    ready: torch.cuda.Event | None
    comes_late: bool = False

    def wait(self) -> DTensor:
        """It, for work on the current stream, which waits; the host does not."""
        if self.ready is not None:
            self.ready.wait(current_stream(self.value.device))
        return self.value


def deliver(parameter: DTensor, accumulator: Any, gradient: Gradient | None) -> DTensor | None:
    """What a backward returns as the gradient of ``parameter``: ``None`` if ``.grad`` will have it.

    ``accumulator`` is the node that comes next for it.
    """
    if gradient is None or accumulates(parameter, accumulator, gradient):
        return None
    return gradient.wait()


def accumulates(parameter: DTensor, accumulator: Any, gradient: Gradient) -> bool:
    """Whether the backward that runs adds ``gradient`` to ``.grad`` and no more.

    Then it is on its way. ``accumulator`` is autograd's node that would do so.
    """
    if not only_accumulates(parameter, accumulator):
        return False
    _running.arrivals().put(parameter, gradient)
    return True


class _Arrivals:
    """Gradients of one backward that are not in ``.grad`` yet, in order.

    Autograd's engine owns it, so that those of a backward that raises are gone with it.
    """

    def __init__(self) -> None:
        self._coming: deque[tuple[DTensor, Gradient, torch.Tensor | None]] = deque()

    def put(self, parameter: DTensor, gradient: Gradient) -> None:
        self._coming.append((parameter, gradient, parameter.grad))
        # The end of the backward is soon enough for those that the computation would wait for.
        if len(self._coming) > SITES_BETWEEN and not self._coming[0][1].comes_late:
            _accumulate(*self._coming.popleft())

    def finish(self) -> None:
        """The backward is over."""
        with torch.no_grad():
            while self._coming:
                _accumulate(*self._coming.popleft())


def _accumulate(parameter: DTensor, gradient: Gradient, before: torch.Tensor | None) -> None:
    """Add to ``.grad``, in place as autograd does where that was there ``before``.

    Autograd's node comes after all sites of its parameter. What it has put there since may lie in
    the memory of another gradient: it cannot tell of DTensors, as it can of plain tensors.
    """
    value, present = gradient.wait(), parameter.grad
    if present is not None and present is before:
        _add(present, value)
        return
    if present is not None:
        _add(value, present)
    parameter.grad = value


def _add(total: torch.Tensor, part: torch.Tensor) -> None:
    dtensors = isinstance(total, DTensor) and isinstance(part, DTensor)
    if dtensors and total.placements == part.placements:  # type: ignore[attr-defined]
        total._local_tensor.add_(part._local_tensor)  # type: ignore[attr-defined]
    else:
        total.add_(part)
    # It is the last that is heard of `part`, whose memory may be another stream's: that of forward.
    read: torch.Tensor = getattr(part, "_local_tensor", part)
    if read.is_cuda:
        read.record_stream(current_stream(read.device))


class _Running(threading.local):
    """The backward that ran last in this thread; one within another is one of its own."""

    def __init__(self) -> None:
        self._backward, self._arrivals = -1, weakref.ref(_Arrivals())

    def arrivals(self) -> _Arrivals:
        backward, arrivals = running_backward(), self._arrivals()
        if arrivals is None or backward != self._backward:
            arrivals = _Arrivals()
            at_its_end(arrivals.finish)
            self._backward, self._arrivals = backward, weakref.ref(arrivals)
        return arrivals


_running = _Running()
