"""Collectives of a ring and of its replicas, by the name of what they are for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from rtp_wrap.gradient import Gradient
from rtp_wrap.profiling import profiler_range
from rtp_wrap.ring import Ring


@contextmanager
def collective(operation: str, fqn: str, ring: Ring) -> Iterator[None]:
    """A block with a collective, which has its name in a profiler's trace, and in errors."""
    try:
        with profiler_range(operation, fqn):
            yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise RuntimeError(
            f"{fqn} {operation} failed on rank {ring.place}: {error}\nUnless that says why, "
            f"another rank has raised, died, or runs another layer; see its own error first"
        ) from error


def over_replicas(gradient: Gradient, ring: Ring, fqn: str) -> Gradient:
    """The mean of what the rings of a 2-D mesh have averaged, each over its own ranks."""
    if ring.replicas is None:
        return gradient
    value, ready = gradient
    sums = ring.precision.accumulator_dtype(value.dtype)
    with collective("average over replicas", fqn, ring):
        return Gradient(value, ring.replicas.average(value._local_tensor, sums, ready))
