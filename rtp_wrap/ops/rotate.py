"""One rotation, forward or backward, by the ring's transport; the loop is the same for every layer.

``products`` says what is called with the tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.distributed.tensor import DTensor

from rtp_wrap.gradient import Gradient
from rtp_wrap.ops import hop, pull
from rtp_wrap.ops.products import Product, Reader, WeightGradient
from rtp_wrap.over_rings import over_rings
from rtp_wrap.profiling import profiler_range
from rtp_wrap.ring import Ring
from rtp_wrap.shard import sharded_dim

_NOTHING = nullcontext()


def without_autocast(kind: str) -> AbstractContextManager[object]:
    """Products in the dtypes of what they are given, on devices of this kind."""
    if torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return _NOTHING


def _current(device: torch.device) -> AbstractContextManager[object]:
    """``device`` as the current one of this thread, by which the driver knows streams and memory.

    Each thread has its own; torch itself goes by the tensors.
    """
    if device.type == "cuda" and torch.cuda.current_device() != device.index:
        return torch.cuda.device(device)
    return _NOTHING


def rotate_forward(
    ring: Ring,
    fqn: str,
    weight: DTensor,
    dtype: torch.dtype,
    product: Product,
    reader: Reader | None = None,
) -> None:
    """Call ``product`` with every tile of ``weight``, in ``dtype``, on every rank.

    Or ``reader``, if there is one, with the tiles where they are: for weights sharded along their
    rows, where ranks read each other's memory. All ranks have a ``reader`` or none has.
    """
    event = f"{fqn} forward"
    with profiler_range("forward", fqn), _current(ring.device):
        if ring.peers is None:
            hop.forward(ring, event, weight, dtype, product)
        elif reader is not None and sharded_dim(weight) == 0:
            pull.read(ring, event, weight, dtype, reader)
        else:
            pull.forward(ring, event, weight, dtype, product)


def rotate_backward(
    ring: Ring,
    fqn: str,
    weight: DTensor,
    dtype: torch.dtype,
    dgrad: Product | None,
    wgrad: WeightGradient | None,
) -> Gradient | None:
    """Call ``dgrad`` with every tile, and ``wgrad`` for its gradient; returns ``dW``, averaged.

    Either may be ``None`` where its result is not needed. Sums over ranks are in
    ``accumulator_dtype`` of the ring's precision policy. ``dW`` may still be on its way.
    """
    by = hop if ring.peers is None else pull
    event = f"{fqn} backward ({'dx' if dgrad else ''} {'dw' if wgrad else ''})"
    with profiler_range("backward", fqn), _current(ring.device):
        dw = by.backward(ring, event, weight, dtype, dgrad, wgrad)
    if dw is None:
        return None
    ready = None if ring.peers is None or not weight.numel() else ring.peers.averaged()
    return over_rings(dw, ready, weight, ring, fqn)


def in_layers_dtype(
    ring: Ring, fqn: str, weight: DTensor, xs: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """The inputs in the dtype of the layer's products; ``TypeError`` if they have another one.

    That dtype is the precision policy's for the weight, or autocast's, which casts inputs itself.
    """
    dtype = autocast_dtype(xs)
    if dtype is not None:
        return [x.to(dtype) for x in xs]
    dtype = ring.precision.compute_dtype(weight.dtype)
    for x in xs:
        check_dtype(fqn, x, dtype)
    return list(xs)


def autocast_dtype(xs: Sequence[torch.Tensor]) -> torch.dtype | None:
    """In which autocast computes on the inputs, if it does."""
    kind = xs[0].device.type
    if not torch.is_autocast_enabled(kind):
        return None
    castable = all(x.is_floating_point() and x.dtype != torch.float64 for x in xs)
    return torch.get_autocast_dtype(kind) if castable else None


def check_dtype(fqn: str, x: torch.Tensor, dtype: torch.dtype) -> None:
    """Raise ``TypeError`` for an input of another dtype than the layer's."""
    if x.dtype != dtype:
        raise TypeError(
            f"{fqn}: input is {x.dtype} but the layer computes in {dtype}; convert the input, "
            f"or use torch.autocast or a MixedPrecisionPolicy"
        )
