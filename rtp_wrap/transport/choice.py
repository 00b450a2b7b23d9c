"""Which transport the ranks of a group use, agreed between all of them."""

from __future__ import annotations

import logging
import os
import platform
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rtp_wrap.policy import check_transport
from rtp_wrap.rings import Rings
from rtp_wrap.transport.cells import PeerMemory
from rtp_wrap.transport.shared import SharedMemory
from rtp_wrap.transport.symmetric import SymmetricMemory, driver

log = logging.getLogger("rtp_wrap")

#: Stands in for ``"auto"``, for a program whose source should stay as it is.
VARIABLE = "RTP_WRAP_TRANSPORT"
_PREFER_PEER = "peer, if it can be"
#: Sequences of barriers: of weights and of gradients.
LANES = 2


@dataclass(frozen=True)
class _Facts:
    """Of one rank: where it is, and what its device can read."""

    host: str
    device: str
    reads: frozenset[str]
    lacks: str
    #: How often the process has met others for symmetric memory, in whatever group.
    meetings: int = 0


def wanted(transport: str) -> str:
    """The policy's transport; in the place of ``"auto"`` what the environment prefers, if anything.

    A preference does without the other transport only where it must.
    """
    preferred = os.environ.get(VARIABLE)
    if transport != "auto" or not preferred:
        return transport
    check_transport(VARIABLE, preferred)
    return _PREFER_PEER if preferred == "peer" else preferred


def candidates(transport: str, rings: Rings, device: torch.device) -> tuple[str, ...]:
    """The transports that all ``rings`` can use for what is ``wanted``, the best first.

    All ranks call this together, and get the same. ``"auto"`` is ``"peer"`` where every rank has a
    GPU of its own, on the host of its ring, that can read those of all others in it. Raises
    ``ValueError`` on every rank if ``"peer"`` is wanted where it cannot be.
    """
    if rings.length == 1 or transport == "ring":
        return ("ring",)
    if transport == "auto" and device.type != "cuda":
        return ("ring",)
    facts = _exchanged(_facts(device), rings.own)
    obstacle = _obstacle(facts, rings.place_of(0), on_gpus=device.type == "cuda")
    if rings.across is not None:
        obstacle = next(filter(None, _exchanged(obstacle, rings.across)), "")
    if not obstacle:
        return ("peer",) if transport == "peer" else ("peer", "ring")
    if transport == "peer":
        raise ValueError(f"transport='peer' cannot be used: {obstacle}; use 'auto'")
    if rings.place == 0:
        log.info("transport 'ring', not 'peer': %s", obstacle)
    return ("ring",)


def likely(transport: str, world_size: int) -> tuple[str, ...]:
    """What ``candidates`` would say if the ranks were on this host, one for each GPU."""
    if world_size == 1 or transport == "ring":
        return ("ring",)
    if transport == "peer":
        return ("peer",)
    gpus = range(world_size if torch.cuda.device_count() >= world_size else 0)
    reads = [torch.cuda.can_device_access_peer(a, b) for a in gpus for b in gpus if a != b]
    both = all(reads) if reads else transport == _PREFER_PEER
    return ("peer", "ring") if both else ("ring",)


def open_memory(rings: Rings, device: torch.device, nbytes: int) -> PeerMemory:
    """Memory of every rank that all of its ring can read; all ranks call this together.

    Raises ``RuntimeError`` on every rank if one of them does not get it.
    """
    kind = SymmetricMemory if device.type == "cuda" else SharedMemory
    memory: SymmetricMemory | SharedMemory | None = None
    for step in ("allocate", "map"):
        failure = ""
        try:
            if memory is None:
                memory = kind(rings.own, device, nbytes, LANES)
            else:
                memory.meet(rings.own)
        except (RuntimeError, OSError) as error:
            failure = f"{type(error).__name__}: {error}"
        everyones = enumerate(_exchanged(failure, rings.own), rings.place_of(0))
        failures = [f"rank {rank}: {each}" for rank, each in everyones if each]
        if failures:
            raise RuntimeError(
                f"could not {step} {nbytes} bytes of staging that all ranks can read "
                f"({'; '.join(failures)}): lower staging_bytes, or use transport='ring'"
            )
    assert memory is not None
    return memory


def _facts(device: torch.device) -> _Facts:
    host = f"{socket.gethostname()} {_boot()}"
    if device.type != "cuda":
        return _Facts(host, f"process {os.getpid()}", frozenset(), "")
    devices = range(torch.cuda.device_count())
    uuids = {each: str(torch.cuda.get_device_properties(each).uuid) for each in devices}
    reads = frozenset(
        uuids[each]
        for each in devices
        if each != device.index and torch.cuda.can_device_access_peer(device.index, each)
    )
    return _Facts(host, uuids[device.index], reads, _lacking(), SymmetricMemory.meetings)


def _boot() -> str:
    """Tells hosts of equal names from each other, as containers often are."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else platform.node()


def _lacking() -> str:
    try:
        driver()
    except (OSError, AttributeError) as error:
        return f"the CUDA driver has no stream memory operations ({error})"
    return ""


def _obstacle(facts: Sequence[_Facts], first: int, on_gpus: bool) -> str:
    """Why ranks, from number ``first`` on, cannot read each other's memory; empty if they can."""
    if len({each.host for each in facts}) > 1:
        return "the ranks are on several hosts"
    for rank, each in enumerate(facts, first):
        if each.lacks:
            return f"rank {rank}: {each.lacks}"
        others = {other.device for at, other in enumerate(facts, first) if at != rank}
        if each.device in others:
            return f"rank {rank} shares its GPU with another rank"
        if on_gpus and not others <= each.reads:
            return f"the GPU of rank {rank} cannot read those of all others, or does not see them"
    meetings = [each.meetings for each in facts]
    if len(set(meetings)) > 1:
        # Ranks look for each other under this number, so they would not find each other.
        return (
            f"ranks have wrapped models {meetings} times with GPUs that read each other's memory, "
            f"in groups that not all of them are in, and torch counts all groups together"
        )
    return ""


def _exchanged(mine: Any, group: dist.ProcessGroup) -> list[Any]:
    gathered: list[Any] = [None] * group.size()
    dist.all_gather_object(gathered, mine, group=group)
    return gathered
