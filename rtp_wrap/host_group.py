"""Connections between the hosts of a group's ranks, beside the group's own backend."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


def host_group(
    store: dist.Store, rank: int, size: int, timeout: timedelta
) -> tuple[dist.Store, Any]:
    """A new Gloo group of ``size`` ranks that share ``store``, and a store of its own.

    It is freed with its object, and unlike ``new_group`` it concerns nobody else. All ranks call
    this in the same order.
    """
    serial = store.add(f"rtp_wrap/{rank}", 1)
    own = dist.PrefixStore(f"rtp_wrap/{serial}", store)
    return own, dist.ProcessGroupGloo(own, rank, size, timeout)


def timeout_of(group: dist.ProcessGroup) -> timedelta:
    """The group's own timeout, so that nothing waits longer than the user allowed."""
    kind = "cuda" if "nccl" in str(dist.get_backend_config(group)) else "cpu"
    timeout = group._get_backend(torch.device(kind)).options._timeout
    assert isinstance(timeout, timedelta)
    return timeout
