"""Connections between the hosts of a group's ranks, beside the group's own backend."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


def host_group(group: dist.ProcessGroup) -> tuple[dist.Store, Any]:
    """A new Gloo group of the ranks of ``group``, and its store.

    It is freed with its object, and unlike ``new_group`` it concerns nobody outside of ``group``,
    whose ranks call this in the same order.
    """
    rank = group.rank()
    serial = group.get_group_store().add(f"rtp_wrap/{rank}", 1)
    store = dist.PrefixStore(f"rtp_wrap/{serial}", group.get_group_store())
    return store, dist.ProcessGroupGloo(store, rank, group.size(), timeout_of(group))


def timeout_of(group: dist.ProcessGroup) -> timedelta:
    """The group's own timeout, so that nothing waits longer than the user allowed."""
    kind = "cuda" if "nccl" in str(dist.get_backend_config(group)) else "cpu"
    timeout = group._get_backend(torch.device(kind)).options._timeout
    assert isinstance(timeout, timedelta)
    return timeout
