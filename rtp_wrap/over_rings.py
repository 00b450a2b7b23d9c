"""What becomes of a gradient that a ring has averaged over its own ranks."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor

from rtp_wrap.collective import collective
from rtp_wrap.gradient import Gradient
from rtp_wrap.ring import Ring
from rtp_wrap.shard import dtensor_like


def dtype_in_ring(weight: DTensor, ring: Ring) -> torch.dtype:
    """The dtype of a ring's mean: the weight's own, or where rings sum it up further, of the sum.

    So it is rounded once.
    """
    return weight.dtype if ring.replicas is None else ring.precision.accumulator_dtype(weight.dtype)


def over_rings(
    mean: torch.Tensor, ready: torch.cuda.Event | None, weight: DTensor, ring: Ring, fqn: str
) -> Gradient:
    """The gradient of ``weight``, of which this ring's ``mean`` is there when ``ready``."""
    if ring.replicas is None:
        return Gradient(dtensor_like(mean, weight), ready)
    tag = ring.lockstep.digest
    with collective("average over rings", fqn, ring):
        mean, ready = ring.replicas.average(mean, weight.dtype, ready, tag)
    return Gradient(dtensor_like(mean, weight), ready, comes_late=ready is not None)
