"""The gradient of a rotated weight, as an autograd node of its own.

A rotation's backward computes the gradients of the input and of the weight, but the latter may be
finished later, beside the computation (see ``transport.peer``), which has to wait for it before
anybody takes it: for a sum with another one, a hook, ``.grad``, ``autograd.grad``. So the weight
has a node, which autograd runs a few sites after the rotation's. By then the gradient has come, or
almost, and waiting for it takes the device no time.

All of autograd's own work is on the computation's stream like that. With nodes on the stream where
gradients are finished autograd would add them up there, and it does not record that for DTensors:
what it has added to another gradient would be overwritten before it is read.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import Any, NamedTuple

import torch
from torch.distributed.tensor import DTensor

from rtp_wrap.engine import at_its_end, order_of, put_in_order, running_backward
from rtp_wrap.ring import Ring
from rtp_wrap.shard import dtensor_like
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


class Pending:
    """Gradients of a weight on the way to its node, by backward: hooks can run one within one."""

    __slots__ = ("_gradients",)

    def __init__(self) -> None:
        self._gradients: dict[int, list[Gradient]] = {}

    def put(self, gradient: Gradient) -> None:
        """Leave it; to be called in a backward."""
        backward = running_backward()
        if backward not in self._gradients:
            self._gradients[backward] = []

            def drop() -> None:
                """Nobody takes it in torch.autograd.grad() of an input alone, say."""
                self._gradients.pop(backward, None)

            at_its_end(drop)
        self._gradients[backward].append(gradient)

    def take(self) -> DTensor | None:
        """The sum of what was left in this backward, for work on the current stream."""
        gradients = self._gradients.pop(running_backward(), None)
        if not gradients:
            return None
        first, *others = [gradient.wait() for gradient in gradients]
        if not others:
            return first
        total = first._local_tensor
        for other in others:
            total = total + other._local_tensor
        return dtensor_like(total, first)

    def __len__(self) -> int:
        return len(self._gradients)

    def clear(self) -> None:
        """Of backwards that raised."""
        self._gradients.clear()


class RotatingWeight:
    """A weight in one use, and its gradient on the way from the op's node to the weight's."""

    __slots__ = ("_pending", "token_gradient", "weight")

    def __init__(self, weight: DTensor, ring: Ring, pending: Pending | None = None) -> None:
        self.weight = weight
        self._pending = Pending() if pending is None else pending
        self.token_gradient = ring.no_gradient

    def put(self, gradient: Gradient | None) -> torch.Tensor | None:
        """Leave the gradient for the weight's node; returns that of the token."""
        if gradient is None:
            return None
        self._pending.put(gradient)
        return self.token_gradient

    def take(self) -> DTensor | None:
        return self._pending.take()


def rotating(weight: DTensor, ring: Ring) -> tuple[torch.Tensor | None, RotatingWeight]:
    """The weight for one use, and a token that stands in for it as the op's input.

    The token is empty, fp32; ``None`` where no gradient is wanted.
    """
    use = RotatingWeight(weight, ring)
    return token_of(use, ring), use


def token_of(use: RotatingWeight, ring: Ring) -> torch.Tensor | None:
    """What stands in for the weight of ``use``; its gradient's node takes from ``use``."""
    if not (torch.is_grad_enabled() and use.weight.requires_grad):
        return None
    before = _numbers.last
    token: torch.Tensor = _WeightNode.apply(use.weight, use)
    if ring.peers is not None and ring.overlap:  # else it is there when the rotation is over
        _put_off(token.grad_fn, before)
    return token


class _Numbers(threading.local):
    """Of the last weights' nodes of this thread: each thread counts its nodes."""

    def __init__(self) -> None:
        # At first, of nodes that are older than any weight's.
        leaf = torch.empty(0, device="cpu", requires_grad=True)
        nodes: list[Any] = [leaf.view_as(leaf).grad_fn for _ in range(SITES_BETWEEN)]
        self.last = deque(map(order_of, nodes), maxlen=SITES_BETWEEN)


_numbers = _Numbers()


def _put_off(node: Any, before: deque[int]) -> None:
    """Have ``node`` run when the backward of the site ``SITES_BETWEEN`` before its own has run.

    Of the nodes that are ready autograd runs the youngest, the one with the highest number. So a
    node with that of an older one comes later. Each of those numbers is given to one node, so that
    weights' nodes have one order, the same on all ranks.
    """
    number = order_of(node)
    put_in_order(node, before[0])
    before.append(number)


class _WeightNode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: DTensor, use: RotatingWeight) -> torch.Tensor:
        ctx.use = use
        return torch.empty_like(use.token_gradient)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[DTensor | None, None]:
        return ctx.use.take(), None
