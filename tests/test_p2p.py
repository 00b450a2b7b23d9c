"""The point-to-point ring: what one rank sends is what the rank below receives."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from rtp_wrap.transport import PointToPoint
from tests.ranks import DEVICE_TYPE, LAUNCHED, device, multi_world_sizes, run_ranks

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def _values(rank: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.arange(count) + 100 * rank).to(device(), dtype)


def _move(ring: PointToPoint, outgoing: torch.Tensor, incoming: torch.Tensor, tag: int = 0) -> None:
    for work in ring.post([(outgoing, incoming)], tag):
        work.wait()


def _neighbour(dtype: torch.dtype, count: int) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    incoming = torch.full((count,), -1.0).to(device(), dtype)
    _move(PointToPoint(dist.group.WORLD), _values(rank, count, dtype), incoming)
    assert torch.equal(incoming, _values((rank + 1) % world_size, count, dtype))


@pytest.mark.parametrize("dtype", [*FLOATS, torch.uint8, torch.int64], ids=str)
@multi_world_sizes
def test_a_hop_brings_the_bytes_of_the_rank_above(world_size: int, dtype: torch.dtype) -> None:
    for count in (1, 7, 100_000):
        run_ranks(world_size, _neighbour, dtype, count)


def _around() -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    ring = PointToPoint(dist.group.WORLD)
    tile = mine = _values(rank, 5, torch.float32)
    for hop in range(1, world_size + 1):
        arriving = torch.empty_like(tile)
        _move(ring, tile, arriving, tag=hop)
        tile = arriving
        assert torch.equal(tile, _values((rank + hop) % world_size, 5, torch.float32))
    assert torch.equal(tile, mine)


@multi_world_sizes
def test_after_a_whole_round_a_tile_is_back(world_size: int) -> None:
    run_ranks(world_size, _around)


def _together() -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    above = (rank + 1) % world_size
    sent = [_values(rank, 6, torch.float32), -_values(rank, 3, torch.float64)]
    received = [torch.empty_like(each) for each in sent]
    hops = zip(sent, received, strict=True)
    for work in PointToPoint(dist.group.WORLD).post(hops, tag=0):
        work.wait()
    assert torch.equal(received[0], _values(above, 6, torch.float32))
    assert torch.equal(received[1], -_values(above, 3, torch.float64))


@multi_world_sizes
def test_hops_of_several_lanes_do_not_mix(world_size: int) -> None:
    run_ranks(world_size, _together)


def _posted(*counts: tuple[int, int]) -> list[tuple[str, int, int, int]]:
    """What reaches the backend, as (operation, elements, peer, tag); nothing is moved."""
    operations: list[Any] = []
    hops = [tuple(torch.zeros(n, device=device()) for n in pair) for pair in counts]
    with patch.object(dist, "batch_isend_irecv", side_effect=operations.extend) as batch:
        PointToPoint(dist.group.WORLD).post(hops, tag=40)
        assert batch.call_count <= 1
    return [(o.op.__name__, o.tensor.numel(), o.peer, o.tag) for o in operations]


@multi_world_sizes
def test_empty_tiles_are_not_sent(world_size: int) -> None:
    for rank, posted in enumerate(run_ranks(world_size, _posted, (0, 3), (4, 0), (0, 0))):
        below, above = (rank - 1) % world_size, (rank + 1) % world_size
        assert posted == [("irecv", 3, above, 40), ("isend", 4, below, 41)]
    assert run_ranks(world_size, _posted, (0, 0)) == [[]] * world_size


@multi_world_sizes
def test_lanes_of_one_set_have_tags_of_their_own(world_size: int) -> None:
    for posted in run_ranks(world_size, _posted, (1, 1), (2, 2)):
        assert [tag for *_, tag in posted] == [40, 40, 41, 41]


def _swapped() -> None:
    """Receive the second tag first: Gloo pairs by tag, not by order."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    ring = PointToPoint(dist.group.WORLD)
    empty = torch.empty(0)
    arrived = {tag: torch.empty(2) for tag in (5, 6)}
    works = [ring.post([(empty, arrived[tag])], tag) for tag in (6, 5)]
    works += [ring.post([(torch.full((2,), 10.0 * rank + tag), empty)], tag) for tag in (5, 6)]
    for work in (each for several in works for each in several):
        work.wait()
    above = (rank + 1) % world_size
    assert {tag: tile.tolist() for tag, tile in arrived.items()} == {
        tag: [10.0 * above + tag] * 2 for tag in (5, 6)
    }


@pytest.mark.skipif(DEVICE_TYPE != "cpu", reason="NCCL ignores tags")
@multi_world_sizes
def test_a_tag_tells_sets_of_hops_apart(world_size: int) -> None:
    run_ranks(world_size, _swapped)


def _in_a_subgroup() -> float | None:
    rank = dist.get_rank()
    group = dist.new_group([1, 2])
    if rank not in (1, 2):
        return None
    incoming = torch.empty(1, device=device())
    _move(PointToPoint(group), torch.tensor([float(rank)], device=device()), incoming)
    return incoming.item()


@pytest.mark.skipif(LAUNCHED, reason="needs three ranks, of which two are a ring")
def test_the_ring_is_that_of_the_group() -> None:
    assert run_ranks(3, _in_a_subgroup) == [None, 2.0, 1.0]
