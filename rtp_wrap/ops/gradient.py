"""The gradient of a rotated weight on its way to ``.grad``.

A rotation's backward computes the gradients of the input and of the weight, but the latter may be
finished later, beside the computation (see ``transport.peer``), which has to wait for it before
anybody takes it. Waiting at once would stop the computation at every layer. So where a gradient
goes to ``.grad`` and nobody looks on, it is put there a few layers later: by then it has come, or
almost, and waiting for it takes the device no time. At the end of a backward all have arrived.

Autograd's own way, which FSDP2 does not go for such gradients either, is left to those that
somebody wants to see: hooks, ``torch.autograd.grad``. The computation waits for these.
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

#: So far the computation is ahead of the averages at the most, where layers fill a slot of the
#: staging; with smaller layers it can be further ahead, and may have to wait.
SITES_BETWEEN = 3


class Gradient(NamedTuple):
    """An averaged gradient, which is there when ``ready`` is; ``None`` if it is there."""

    value: DTensor
    ready: torch.cuda.Event | None

    def wait(self) -> DTensor:
        """It, for work on the current stream, which waits; the host does not."""
        if self.ready is not None:
            self.ready.wait(current_stream(self.value.device))
        return self.value


def deliver(node: Any, weight: DTensor, gradient: Gradient | None) -> DTensor | None:
    """What the backward of a site returns as the gradient of ``weight``, its first input.

    ``node`` is the site's, the one that runs. ``None`` where ``.grad`` will have it.
    """
    if gradient is None or accumulates(weight, node.next_functions[0][0], gradient):
        return None
    return gradient.wait()


def accumulates(weight: DTensor, accumulator: Any, gradient: Gradient) -> bool:
    """Whether the backward that runs adds ``gradient`` to ``weight.grad`` and no more.

    Then it is on its way. ``accumulator`` is autograd's node that would do so.
    """
    if not only_accumulates(weight, accumulator):
        return False
    _running.arrivals().put(weight, gradient)
    return True


class _Arrivals:
    """Gradients of one backward that are not in ``.grad`` yet, in order.

    Autograd's engine owns it, so that those of a backward that raises are gone with it.
    """

    def __init__(self) -> None:
        self._coming: deque[tuple[DTensor, Gradient]] = deque()

    def put(self, weight: DTensor, gradient: Gradient) -> None:
        self._coming.append((weight, gradient))
        if len(self._coming) > SITES_BETWEEN:
            _accumulate(*self._coming.popleft())

    def finish(self) -> None:
        """The backward is over."""
        with torch.no_grad():
            while self._coming:
                _accumulate(*self._coming.popleft())


def _accumulate(weight: DTensor, gradient: Gradient) -> None:
    """Add to ``weight.grad``, in place as autograd does."""
    value, present = gradient.wait(), weight.grad
    if present is None:
        weight.grad = value
    elif isinstance(present, DTensor) and present.placements == value.placements:
        present._local_tensor.add_(value._local_tensor)
    else:
        present.add_(value)


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
