"""The room that tiles need in a staging, by either transport."""

from __future__ import annotations

import torch

from rtp_wrap.policy import MixedPrecisionPolicy
from rtp_wrap.transport import cells
from rtp_wrap.transport.staging import Staging


def tile_itemsize(dtype: torch.dtype, precision: MixedPrecisionPolicy, transport: str) -> int:
    """Bytes of an element in staging, of a weight of ``dtype``.

    Peers sum what is pulled, a ring what travels.
    """
    compute = precision.compute_dtype(dtype)
    if transport == "peer":
        return compute.itemsize
    return max(compute.itemsize, precision.accumulator_dtype(dtype).itemsize)


def staging_for(tile_bytes: int, world_size: int, transport: str, *, overlap: bool) -> int:
    """The least staging in which tiles of this size are never cut."""
    if transport == "peer":
        return cells.slots(overlap=overlap).staging_for(tile_bytes, world_size)
    return Staging.size_for(tile_bytes)
