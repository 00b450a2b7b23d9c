"""Lanes and hops over a real ring: tiles arrive, slots come back, exceptions leave nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.device_mesh import DeviceMesh

from rtp_wrap.hops import Hop, Lane, Rotation
from rtp_wrap.ring import Ring
from rtp_wrap.rings import Rings
from rtp_wrap.rotation import schedule
from rtp_wrap.shard import Tile, TileGrid
from tests.ranks import (
    DEVICE_TYPE,
    WORLD_SIZES,
    all_world_sizes,
    device,
    multi_world_sizes,
    run_ranks,
)

TILE = Tile(0, 2, 0, 3)


def _ring(overlap: bool = True, staging_bytes: int = 1024) -> Ring:
    mesh = DeviceMesh.from_group(dist.group.WORLD, DEVICE_TYPE)
    ring = Ring(Rings(mesh), device(), overlap=overlap)
    ring.open("ring", staging_bytes)
    return ring


@contextmanager
def _rotation(ring: Ring, slots: int) -> Iterator[Rotation]:
    """A rotation that must end with all of its slots free, each once."""
    with Rotation(ring, "a site", slots) as rotation:
        yield rotation
    free = sorted(slot.data_ptr() for slot in rotation._free)
    assert free == sorted(slot.data_ptr() for slot in ring.staging.slots(slots))


def _value(owner: int, tile: Tile) -> torch.Tensor:
    """What the weight of these tests holds there."""
    rows = torch.arange(tile.row, tile.row_end, device=device())
    cols = torch.arange(tile.col, tile.col_end, device=device())
    return (1000.0 * owner + 30 * rows[:, None] + cols).double()


def _rotate(
    shape: tuple[int, int], dim: int, overlap: bool, staging_bytes: int, both: bool
) -> None:
    """Weights to all ranks, and accumulators that collect one part per rank on their way home."""
    ring = _ring(overlap, staging_bytes)
    slots = (4 if overlap else 3) if both else 2
    max_numel = ring.staging.slot_bytes(slots) // 8
    grid = TileGrid(shape, dim, ring.world_size, max_numel)
    shard = grid.shard(ring.rank)
    home = _value(ring.rank, shard)
    sums = torch.full_like(home, torch.nan)
    with _rotation(ring, slots) as rotation:
        weights, accumulators = Lane(rotation, home.dtype), Lane(rotation, home.dtype)
        for cell in grid.cells():
            at_home = grid.tile(ring.rank, cell).within(shard)
            weights.load(home[at_home])
            for step in schedule(ring.rank, ring.world_size):
                hops = []
                if step.next_tile is not None:
                    hops.append(weights.hop(grid.tile(step.next_tile, cell).shape))
                gaining = grid.tile(step.accumulator, cell)
                if both and not step.first:
                    hops.append(
                        accumulators.hop(gaining.shape, sums[at_home] if step.last else None)
                    )
                with rotation.turn(hops):
                    expected = _value(step.tile, grid.tile(step.tile, cell))
                    assert torch.equal(weights.tile, expected)
                if both:
                    if step.first:
                        accumulators.start(gaining.shape)
                        accumulators.tile.zero_()
                    accumulators.tile.add_(_value(ring.rank + 1, gaining))
                    if step.last:
                        sums[at_home] = accumulators.tile
            weights.release()
            accumulators.release()
    assert torch.equal(home, _value(ring.rank, shard))  # only read
    if both:
        everyone = [_value(rank + 1, shard) for rank in range(ring.world_size)]
        assert torch.equal(sums, sum(everyone, torch.zeros_like(sums)))


@all_world_sizes
@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "in turns"])
@pytest.mark.parametrize("both", [True, False], ids=["accumulators", "weights alone"])
@pytest.mark.parametrize("dim", [0, 1])
def test_tiles_arrive_and_slots_come_back(
    world_size: int, overlap: bool, both: bool, dim: int
) -> None:
    for shape in ((5, 40), (40, 5), (1, 1), (2, 3)):
        run_ranks(world_size, _rotate, shape, dim, overlap, 1024, both)


@given(
    world_size=st.sampled_from(WORLD_SIZES),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 60)),
    dim=st.sampled_from([0, 1]),
    overlap=st.booleans(),
    staging_bytes=st.integers(1024, 8192),
    both=st.booleans(),
)
def test_tiles_arrive_and_slots_come_back_whatever_the_sizes(
    world_size: int, **options: Any
) -> None:
    run_ranks(world_size, _rotate, **options)


def _reads_home() -> tuple[bool, bool, bool]:
    home = torch.arange(12.0, device=device()).view(4, 3)
    ring = _ring()
    with _rotation(ring, 2) as rotation:
        in_place = []
        for part, dtype in (
            (home[1:3], torch.float32),
            (home[1:3], torch.bfloat16),
            (home[:, 1:], torch.float32),
        ):
            lane = Lane(rotation, dtype)
            lane.load(part)
            assert torch.equal(lane.tile, part.to(dtype))
            assert lane.tile.is_contiguous()
            in_place.append(lane.tile.data_ptr() == part.data_ptr())
            lane.release()
    return tuple(in_place)


@all_world_sizes
def test_a_home_tile_is_copied_only_where_a_hop_cannot_send_it(world_size: int) -> None:
    assert run_ranks(world_size, _reads_home) == [(True, False, False)] * world_size


def _casts() -> None:
    ring = _ring()
    home = torch.full(TILE.shape, 1.0 + ring.rank, device=device())
    with _rotation(ring, 2) as rotation:
        lane = Lane(rotation, torch.bfloat16)
        lane.load(home)
        with rotation.turn([lane.hop(TILE.shape)]):
            assert lane.tile.dtype == torch.bfloat16
        assert lane.tile.eq(1.0 + (ring.rank + 1) % ring.world_size).all()
        lane.release()


@multi_world_sizes
def test_tiles_travel_in_the_dtype_of_their_lane(world_size: int) -> None:
    run_ranks(world_size, _casts)


def _tags(overlap: bool) -> list[int]:
    ring = _ring(overlap)
    tags: list[int] = []
    post = ring.transport.post

    def spy(hops: Any, tag: int) -> list[dist.Work]:
        tags.extend(tag + lane for lane, _ in enumerate(hops))
        return post(hops, tag)

    with patch.object(ring.transport, "post", spy):
        for _ in range(2):  # the same site twice
            with _rotation(ring, 4) as rotation:
                one, two = Lane(rotation, torch.float32), Lane(rotation, torch.float32)
                one.start(TILE.shape)
                two.start(TILE.shape)
                for _ in range(3):
                    with rotation.turn([one.hop(TILE.shape), two.hop(TILE.shape)]):
                        pass
                one.release()
                two.release()
    return tags


@multi_world_sizes
@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "in turns"])
def test_no_two_hops_have_the_same_tag(world_size: int, overlap: bool) -> None:
    first, *others = run_ranks(world_size, _tags, overlap)
    assert len(first) == len(set(first)) == 12
    assert all(tags == first for tags in others)
    assert all(0 <= tag < 2**31 for tag in first)


class _Work:
    def __init__(self, log: list[str], error: str | None = None) -> None:
        self._log, self._error = log, error

    def wait(self) -> None:
        self._log.append(self._error or "done")
        if self._error:
            raise RuntimeError(self._error)


def _one_hop(ring: Ring) -> None:
    with Rotation(ring, "a site", 2) as rotation:
        lane = Lane(rotation, torch.float32)
        lane.start(TILE.shape)
        with rotation.turn([lane.hop(TILE.shape)]):
            pass


def _hop_fails() -> None:
    ring, log = _ring(), []
    works = [_Work(log, "first"), _Work(log), _Work(log, "second")]
    message = rf"a site: hop 1 failed on rank {ring.rank}"
    with (
        patch.object(ring.transport, "post", lambda hops, tag: works),
        pytest.raises(RuntimeError, match=message) as info,
    ):
        _one_hop(ring)
    assert log == ["first", "done", "second"]  # nothing is left in flight
    assert str(info.value.__cause__) == "first"


@all_world_sizes
def test_a_failed_hop_is_reported_with_its_site_after_all_are_over(world_size: int) -> None:
    run_ranks(world_size, _hop_fails)


class _UserError(Exception):
    pass


def _three_hops(ring: Ring, raise_in: int) -> None:
    with Rotation(ring, "a site", 2) as rotation:
        lane = Lane(rotation, torch.float32)
        lane.start(TILE.shape)
        lane.tile.fill_(-1)
        for turn in range(3):
            with rotation.turn([lane.hop(TILE.shape)]):
                if turn == raise_in:
                    raise _UserError


def _raises(overlap: bool, when: int) -> None:
    """All ranks raise in the same step; what they were sent must not reach the next rotation."""
    ring = _ring(overlap)
    with pytest.raises(_UserError):
        _three_hops(ring, raise_in=when)
    with _rotation(ring, 2) as rotation:
        lane = Lane(rotation, torch.float32)
        lane.load(torch.full(TILE.shape, float(ring.rank), device=device()))
        with rotation.turn([lane.hop(TILE.shape)]):
            pass
        assert lane.tile.eq((ring.rank + 1) % ring.world_size).all()
        lane.release()


@multi_world_sizes
@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "in turns"])
def test_an_exception_on_all_ranks_leaves_nothing_in_flight(world_size: int, overlap: bool) -> None:
    for when in range(3):
        run_ranks(world_size, _raises, overlap, when)


def _misuse() -> None:
    ring = _ring()
    with Rotation(ring, "a site", 4) as rotation:
        lane = Lane(rotation, torch.float32)
        with pytest.raises(AssertionError):
            _ = lane.tile
        lane.start(TILE.shape)
        hop = lane.hop(TILE.shape)
        assert isinstance(hop, Hop)
        with pytest.raises(AssertionError, match="lands after it departed"):
            hop.land()
        hop.depart()
        with pytest.raises(AssertionError, match="departs once"):
            hop.depart()
        hop.land()


def test_a_hop_departs_once_and_then_lands() -> None:
    run_ranks(WORLD_SIZES[0], _misuse)
