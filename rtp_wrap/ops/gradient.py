"""The gradient of a rotated weight, as an autograd node of its own.

A rotation's backward computes the gradients of the input and of the weight, but the latter may be
finished on another stream (see ``transport.peer``). Autograd synchronises streams between nodes: so
the weight has a node on that stream, to which the rotation's backward leaves ``dW``, and whoever
takes it from there (an existing ``.grad``, hooks, ``autograd.grad``, what follows ``backward()``)
waits for it, on the device and not before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor

from rtp_wrap.ring import Ring


class RotatingWeight:
    """A weight in one use, and its gradient on the way from the op's node to the weight's."""

    __slots__ = ("_gradient", "_token_gradient", "weight")

    def __init__(self, weight: DTensor, ring: Ring) -> None:
        self.weight = weight
        self._gradient: DTensor | None = None
        self._token_gradient = ring.no_gradient

    def put(self, gradient: DTensor | None) -> torch.Tensor | None:
        """Leave the gradient for the weight's node; returns that of the token."""
        self._gradient = gradient
        return None if gradient is None else self._token_gradient

    def take(self) -> DTensor | None:
        gradient, self._gradient = self._gradient, None
        return gradient


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
    stream = ring.gradient_stream
    if stream is None:
        return _WeightNode.apply(use.weight, use, ring)
    computation = torch.cuda.current_stream(ring.device.index)
    torch.cuda.set_stream(stream)  # a context manager takes longer
    try:
        return _WeightNode.apply(use.weight, use, ring)
    finally:
        torch.cuda.set_stream(computation)


class _WeightNode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: DTensor, use: RotatingWeight, ring: Ring) -> torch.Tensor:
        ctx.use = use
        return torch.empty_like(ring.no_gradient)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[DTensor | None, None, None]:
        return ctx.use.take(), None, None
