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
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from rtp_wrap.ring import Ring

#: The computation may not be further ahead of the averages anyway: their staging has three slots.
SITES_BETWEEN = 3


@dataclass(frozen=True, slots=True)
class Gradient:
    """An averaged gradient, which is there when ``ready`` is; ``None`` if it is there."""

    value: DTensor
    ready: torch.cuda.Event | None

    def wait(self) -> DTensor:
        """It, for work on the current stream, which waits; the host does not."""
        if self.ready is not None:
            torch.cuda.current_stream(self.value.device).wait_event(self.ready)
        return self.value


class RotatingWeight:
    """A weight in one use, and its gradient on the way from the op's node to the weight's."""

    __slots__ = ("_gradient", "_token_gradient", "weight")

    def __init__(self, weight: DTensor, ring: Ring) -> None:
        self.weight = weight
        self._gradient: Gradient | None = None
        self._token_gradient = ring.no_gradient

    def put(self, gradient: Gradient | None) -> torch.Tensor | None:
        """Leave the gradient for the weight's node; returns that of the token."""
        self._gradient = gradient
        return None if gradient is None else self._token_gradient

    def take(self) -> DTensor | None:
        gradient, self._gradient = self._gradient, None
        return None if gradient is None else gradient.wait()


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
    token: torch.Tensor = _WeightNode.apply(use.weight, use, ring)
    if ring.peers is not None:
        _put_off(token.grad_fn)
    return token


class _Numbers(threading.local):
    """Of the last weights' nodes of this thread; each thread counts its own nodes."""

    def __init__(self) -> None:
        self.last: deque[int] = deque(maxlen=SITES_BETWEEN)


_numbers = _Numbers()


def _put_off(node: Any) -> None:
    """Have ``node`` run when the backward of the site ``SITES_BETWEEN`` before its own has run.

    Of the nodes that are ready autograd runs the youngest, the one with the highest number. So a
    node with that of an older one comes later, and any number is right. But those of weights always
    have one order, or the gradients of several uses would be added in another, and differ in the
    last bit. No public call sets a number.
    """
    last = _numbers.last
    number = node._sequence_nr()
    node._set_sequence_nr(last[0] if len(last) == SITES_BETWEEN else len(last))
    last.append(number)


class _WeightNode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: DTensor, use: RotatingWeight, ring: Ring) -> torch.Tensor:
        ctx.use = use
        return torch.empty_like(ring.no_gradient)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[DTensor | None, None, None]:
        return ctx.use.take(), None, None
