"""What the model of communication needs to know of a machine, measured; all ranks call each."""

from __future__ import annotations

import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from harness.hardware import this_device
from rtp_wrap.rings import Rings
from rtp_wrap.transport import PointToPoint, candidates, open_memory, wanted
from rtp_wrap.transport.cells import aligned

CALLS, REPEATS = 10, 5


def seconds(action: Callable[[], object]) -> float:
    """Of one call of many in a row, as a training step makes them: the median of some rows.

    On CUDA a call takes what is longer, its kernels or launching them.
    """

    def row() -> float:
        dist.barrier()
        start = _now()
        for _ in range(CALLS):
            action()
        return (_now() - start) / CALLS

    row()
    return statistics.median(row() for _ in range(REPEATS))


def hops(sizes: Sequence[int]) -> list[float]:
    """Seconds of a hop of each of ``sizes`` (bytes) round the ring, by ``rtp_wrap``'s transport."""
    return [seconds(_Hops(size)) for size in sizes]


def gathers(sizes: Sequence[int]) -> list[float]:
    """Seconds of an all-gather in which a rank receives each of ``sizes`` (bytes) from others."""
    # The second is its name before torch 2.13.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    ranks, times = dist.get_world_size(), []
    for size in sizes:
        own = torch.zeros(size // (ranks - 1), dtype=torch.uint8, device=this_device())
        whole = own.new_empty(ranks * len(own))
        times.append(seconds(functools.partial(gather, whole, own)))
    return times


def pulls(sizes: Sequence[int]) -> list[float] | None:
    """Seconds in which a rank pulls each of ``sizes`` (bytes) from the others, as they do.

    ``None`` where ranks cannot read each other's memory.
    """
    return [seconds(_Pulls(size)) for size in sizes] if _are_peers() else None


def copies(nbytes: int) -> float:
    """Seconds of a copy of ``nbytes`` in a rank's own memory."""
    there = torch.zeros(nbytes, dtype=torch.uint8, device=this_device())
    return seconds(functools.partial(torch.empty_like(there).copy_, there))


def beside_hop(nbytes: int, tokens: int, features: int, dtype: torch.dtype) -> tuple[float, ...]:
    """Seconds of a hop of ``nbytes``, of products that take thrice as long, and of both together.

    The products are of ``[tokens, features]`` and ``[features, features]``.
    """
    return _beside(_Hops(nbytes), tokens, features, dtype)


def beside_pull(nbytes: int, tokens: int, features: int, dtype: torch.dtype) -> tuple[float, ...]:
    """The same of a pull, where there are ``pulls``."""
    return _beside(_Pulls(nbytes), tokens, features, dtype)


def _beside(
    hop: _Hops | _Pulls, tokens: int, features: int, dtype: torch.dtype
) -> tuple[float, ...]:
    # At random: a GPU multiplies zeros with less power, hence faster.
    x = torch.randn(tokens, features, dtype=dtype, device=this_device())
    weight, y = x.new_empty(features, features).normal_(), torch.empty_like(x)
    alone = seconds(hop)
    # All ranks the same number, or the slower ones' hops would wait for the faster ones' products.
    most = torch.tensor(math.ceil(3 * alone / seconds(lambda: torch.mm(x, weight, out=y))))
    most = most.to(x.device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    times = int(most)

    def products() -> None:
        for _ in range(times):
            torch.mm(x, weight, out=y)

    return alone, seconds(products), seconds(lambda: hop(products))


def kept(hop: float, products: float, both: float) -> float:
    """The share of their speed that products keep beside a hop, from the seconds of ``beside``."""
    return min(1.0, max(0.0, 1 - (both - products) / hop))


class _Hops:
    """Hops one after another, as a rotation makes them: out of the buffer that the last filled."""

    def __init__(self, nbytes: int) -> None:
        device = this_device()
        self._transport = PointToPoint(_ring().own)
        self._there = torch.zeros(nbytes, dtype=torch.uint8, device=device)
        self._arriving = torch.empty_like(self._there)
        self._tags = itertools.count()

    def __call__(self, products: Callable[[], None] = lambda: None) -> None:
        works = self._transport.post([(self._there, self._arriving)], next(self._tags))
        products()
        for work in works:
            work.wait()
        self._there, self._arriving = self._arriving, self._there


class _Pulls:
    """Pulls one after another, always the same: ``nbytes`` into every rank, from all others."""

    def __init__(self, nbytes: int) -> None:
        device, ring = this_device(), _ring()
        rank, ranks = ring.place, ring.size
        part = aligned(nbytes // (ranks - 1))  # as tiles are
        self._memory = open_memory(ring, device, ranks * part)
        own = self._memory.of(rank)
        places = [slice(turn * part, (turn + 1) * part) for turn in range(ranks)]
        self._copies = self._memory.prepared(
            [
                (own[places[turn]], self._memory.of((rank + turn) % ranks)[places[0]])
                for turn in range(1, ranks)
            ]
        )
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._flag = 0

    def __call__(self, products: Callable[[], None] = lambda: None) -> None:
        stream = self._stream
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream())
        self._flag ^= 1
        self._memory.barrier(0, self._flag, stream)
        self._memory.copy(self._copies, stream)
        products()
        if stream is not None:
            torch.cuda.current_stream().wait_stream(stream)


def _are_peers() -> bool:
    return candidates(wanted("auto"), _ring(), this_device())[0] == "peer"


def _ring() -> Rings:
    return Rings(init_device_mesh(this_device().type, (dist.get_world_size(),)))


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
