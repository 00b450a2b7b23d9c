"""A rotation by pulls: each rank reads the tiles of the others, and owners the parts of gradients.

The loop of ``transport.peer``: while a cell is computed on, the next one is on its way, of the same
layer or of the next one, as far as the host is ahead of the device.
"""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor

from rtp_wrap.ops.products import Product, Reader, WeightGradient
from rtp_wrap.ring import Ring
from rtp_wrap.transport.cells import PeerError
from rtp_wrap.transport.peer import PeerTransport


def forward(ring: Ring, event: str, weight: DTensor, dtype: torch.dtype, product: Product) -> None:
    """``rotate_forward``."""
    peers, begun = _begin(ring, event)
    try:
        visit = peers.visit(event, weight, dtype)
        for index in range(len(visit.cells)):
            for tile, values in peers.pull(visit, index):
                product(tile, values)
    except BaseException as error:
        _interrupt(ring, event, peers.barriers - begun, error)
        raise


def read(ring: Ring, event: str, weight: DTensor, dtype: torch.dtype, reader: Reader) -> None:
    """``rotate_forward`` of a weight sharded along its rows, with a ``reader``."""
    peers, begun = _begin(ring, event)
    try:
        visit = peers.visit(event, weight, dtype, reads=True)
        for index in range(len(visit.cells)):
            peers.read(visit, index, reader)
    except BaseException as error:
        _interrupt(ring, event, peers.barriers - begun, error)
        raise


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
    peers, begun = _begin(ring, event)
    try:
        dw = peers.gradient(home) if wgrad else None
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
    except BaseException as error:
        _interrupt(ring, event, peers.barriers - begun, error)
        raise
    return dw


def _begin(ring: Ring, event: str) -> tuple[PeerTransport, int]:
    """The peers at the beginning of a rotation, and how many exchanges they had before."""
    peers = ring.peers
    assert peers is not None
    ring.begin(event)
    return peers, peers.barriers


def _interrupt(ring: Ring, event: str, exchanges: int, error: BaseException) -> None:
    """``error`` leaves a rotation after so many exchanges; raises another one if that says more."""
    ring.interrupt(exchanges)
    if isinstance(error, PeerError):
        raise ring.not_answered(event, exchanges) from error
