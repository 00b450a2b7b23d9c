"""A rotation by pulls: each rank reads the tiles of the others, and owners the parts of gradients.

The loop of ``transport.peer``: while a cell is computed on, the next one is on its way, of the same
layer or of the next one, as far as the host is ahead of the device.
"""

from __future__ import annotations

from types import TracebackType

import torch
from torch.distributed.tensor import DTensor, Shard

from rtp_wrap.ops.products import Product, WeightGradient
from rtp_wrap.ring import Ring
from rtp_wrap.transport.peer import Cell, PeerError, PeerTransport


def forward(ring: Ring, fqn: str, weight: DTensor, dtype: torch.dtype, product: Product) -> None:
    """``rotate_forward``."""
    home = weight._local_tensor
    with _Pulls(ring, weight, f"{fqn} forward") as pulls:
        for cell in pulls.cells(dtype):
            for tile, values in pulls.peers.pull(home, cell):
                product(tile, values)
            pulls.peers.release()


def backward(
    ring: Ring,
    fqn: str,
    weight: DTensor,
    dtype: torch.dtype,
    dgrad: Product | None,
    wgrad: WeightGradient | None,
) -> torch.Tensor | None:
    """``rotate_backward``; parts of gradients are in ``dtype``, as what they are products of."""
    home = weight._local_tensor
    sums = ring.precision.accumulator_dtype(weight.dtype)
    event = f"{fqn} backward ({'dx' if dgrad else ''} {'dw' if wgrad else ''})"
    with _Pulls(ring, weight, event) as pulls:
        peers = pulls.peers
        dw = peers.gradient(home) if wgrad else None
        for cell in pulls.cells(dtype):
            if dgrad is not None:
                for tile, values in peers.pull(home, cell):
                    dgrad(tile, values)
                peers.release()
            if wgrad is not None and dw is not None:
                for tile, part in peers.parts(cell):
                    wgrad(tile, None, part, 1.0)
                peers.average(cell, dw, sums)
    return dw


class _Pulls:
    """All pulls of one site in one direction of the pass; a context manager."""

    def __init__(self, ring: Ring, weight: DTensor, event: str) -> None:
        assert ring.peers is not None
        self.peers: PeerTransport = ring.peers
        self._ring, self._weight, self._event = ring, weight, event
        self._begun = self.peers.barriers

    def __enter__(self) -> _Pulls:
        self._ring.begin(self._event)
        self._ring.look(self._weight)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            return
        done = self.peers.barriers - self._begun
        self._ring.interrupt(done)
        if isinstance(error, PeerError):
            raise RuntimeError(
                f"{self._event}: hop {done} failed on rank {self._ring.rank}. Another rank "
                f"has raised, died, or runs another layer; see its own error first"
            ) from error

    def cells(self, dtype: torch.dtype) -> list[Cell]:
        (placement,) = self._weight.placements
        assert isinstance(placement, Shard)
        return self.peers.cells(self._weight.shape, placement.dim, dtype)
