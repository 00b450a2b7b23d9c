"""A rotation by pulls: each rank reads the tiles of the others, and owners the parts of gradients.

The loop of ``transport.peer``: while a cell is computed on, the next one is on its way, of the same
layer or of the next one, as far as the host is ahead of the device.
"""

from __future__ import annotations

from types import TracebackType

import torch
from torch.distributed.tensor import DTensor

from rtp_wrap.ops.products import Product, Reader, WeightGradient
from rtp_wrap.over_rings import dtype_in_ring
from rtp_wrap.ring import Ring
from rtp_wrap.transport.cells import PeerError
from rtp_wrap.transport.peer import PeerTransport


def forward(ring: Ring, event: str, weight: DTensor, dtype: torch.dtype, product: Product) -> None:
    """``rotate_forward``."""
    with _Pulls(ring, event) as peers:
        visit = peers.visit(event, weight, dtype)
        for index in range(len(visit.cells)):
            for tile, values in peers.pull(visit, index):
                product(tile, values)


def read(ring: Ring, event: str, weight: DTensor, dtype: torch.dtype, reader: Reader) -> None:
    """``rotate_forward`` of a weight sharded along its rows, with a ``reader``."""
    with _Pulls(ring, event) as peers:
        visit = peers.visit(event, weight, dtype, reads=True)
        for index in range(len(visit.cells)):
            peers.read(visit, index, reader)


def backward(
    ring: Ring,
    event: str,
    weight: DTensor,
    dtype: torch.dtype,
    dgrad: Product | None,
    wgrad: WeightGradient | None,
) -> torch.Tensor | None:
    """``rotate_backward``; parts of gradients are in ``dtype``, as what they are products of."""
    home = weight._local_tensor
    sums = ring.precision.accumulator_dtype(weight.dtype)
    with _Pulls(ring, event) as peers:
        dw = peers.gradient(home, dtype_in_ring(weight, ring)) if wgrad else None
        visit = peers.visit(event, weight, dtype)
        for index, cell in enumerate(visit.cells):
            if dgrad is not None:
                for tile, values in peers.pull(visit, index):
                    dgrad(tile, values)
            if wgrad is not None and dw is not None:
                parts = peers.parts(cell)
                for tile, part in parts.produced:
                    wgrad(tile, None, part, 1.0)
                peers.average(cell, parts, dw, sums)
    return dw


class _Pulls:
    """All pulls of one site in one direction of the pass; a context manager."""

    def __init__(self, ring: Ring, event: str) -> None:
        assert ring.peers is not None
        self._peers: PeerTransport = ring.peers
        self._ring, self._event = ring, event
        self._begun = self._peers.barriers

    def __enter__(self) -> PeerTransport:
        self._ring.begin(self._event)
        return self._peers

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            return
        done = self._peers.barriers - self._begun
        self._ring.interrupt(done)
        if isinstance(error, PeerError):
            raise self._ring.not_answered(f"{self._event}: hop {done}") from error
