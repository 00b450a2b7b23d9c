"""The index arithmetic, against torch's own: DTensor and `torch.chunk` decide who owns what."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from rtp_wrap.shard import Tile, TileGrid, contiguous_stride, extent

sizes = st.integers(1, 40)
world_sizes = st.integers(1, 9)
grids = st.builds(
    TileGrid, st.tuples(sizes, sizes), st.sampled_from([0, 1]), world_sizes, st.integers(1, 500)
)


def _tiles(grid: TileGrid) -> Iterator[tuple[int, tuple[int, int], Tile]]:
    for owner in range(grid.world_size):
        for cell in grid.cells():
            yield owner, cell, grid.tile(owner, cell)


@given(size=st.integers(0, 5000), world_size=st.integers(1, 64))
@example(size=0, world_size=3)
@example(size=2, world_size=4)  # the last ranks own nothing
@example(size=5, world_size=4)  # 2, 2, 1, 0
def test_extents_are_those_of_torch_chunk(size: int, world_size: int) -> None:
    chunks = [chunk.tolist() for chunk in torch.arange(size).chunk(world_size)]
    chunks += [[]] * (world_size - len(chunks))
    extents = [extent(size, world_size, rank) for rank in range(world_size)]
    assert [list(range(*each)) for each in extents] == chunks


@pytest.mark.parametrize("dim", [0, 1])
def test_a_shard_is_a_slab_of_the_weight(dim: int) -> None:
    weight = torch.arange(35).view(5, 7)
    grid = TileGrid((5, 7), dim, world_size=3, max_numel=4)
    shards = [grid.shard(owner) for owner in range(3)]
    for shard, chunk in zip(shards, weight.chunk(3, dim), strict=True):
        assert torch.equal(weight[shard.rows, shard.cols], chunk)
        assert shard.shape == tuple(chunk.shape)
        assert shard.numel == chunk.numel()


@given(grids)
def test_tiles_cover_every_element_exactly_once(grid: TileGrid) -> None:
    covered = torch.zeros(grid.shape, dtype=torch.int64)
    for _, _, tile in _tiles(grid):
        covered[tile.rows, tile.cols] += 1
    assert torch.equal(covered, torch.ones_like(covered))


@given(grids)
def test_no_tile_is_larger_than_a_slot(grid: TileGrid) -> None:
    assert all(tile.numel <= grid.max_numel for _, _, tile in _tiles(grid))


@given(grids)
def test_tiles_lie_in_their_owners_shard(grid: TileGrid) -> None:
    weight = torch.arange(grid.shape[0] * grid.shape[1]).view(grid.shape)
    for owner, _, tile in _tiles(grid):
        shard = grid.shard(owner)
        home = weight[shard.rows, shard.cols]  # what the owner has
        assert torch.equal(home[tile.within(shard)], weight[tile.rows, tile.cols])


@given(grids)
def test_owner_0_never_has_the_smaller_tile(grid: TileGrid) -> None:
    """The number of cells is owner 0's: nobody may need more, or larger ones."""
    for _, cell, tile in _tiles(grid):
        first = grid.tile(0, cell).shape
        assert tile.shape[0] <= first[0]
        assert tile.shape[1] <= first[1]
        assert 0 not in first


@given(grids)
def test_there_are_hardly_more_cells_than_slots_that_fit_require(grid: TileGrid) -> None:
    """Fewer hops of larger tiles: rows stay whole where one fits, and are lost in part at most."""
    rows, cols = grid.shard(0).shape
    cell_rows, cell_cols = grid.cell
    if cols <= grid.max_numel:
        assert cell_cols == cols
        _check_pieces(rows, grid.max_numel // cols, cell_rows)
    else:
        assert cell_rows == 1
        _check_pieces(cols, grid.max_numel, cell_cols)


def _check_pieces(size: int, limit: int, piece: int) -> None:
    assert piece == size if size <= limit else piece <= limit
    assert -(-size // piece) <= -(-size // (limit - limit // 8))


@given(size=st.integers(1, 20000), limit=st.integers(64, 20000), dim=st.sampled_from([0, 1]))
@example(size=16000, limit=7168, dim=0)  # three pieces, but not of 5334
def test_pieces_begin_where_products_can_read_them(size: int, limit: int, dim: int) -> None:
    """At multiples of 16 bytes: those of 8 elements are, of 16 bits or more."""
    shape = (size, 1) if dim == 0 else (1, size)
    piece = TileGrid(shape, 1 - dim, 1, limit).cell[dim]
    _check_pieces(size, limit, piece)
    if size > limit:
        assert piece % 8 == 0
        assert piece % 128 == 0 or limit < 1024


@pytest.mark.parametrize(
    ("max_numel", "cell"),
    [
        (1000, (8, 10)),  # the whole shard
        (80, (8, 10)),
        (79, (4, 10)),  # two halves, not seven rows and one
        (10, (1, 10)),
        (9, (1, 5)),  # two halves of a row, not nine columns and one
        (1, (1, 1)),
    ],
)
def test_a_shard_is_cut_into_equal_pieces(max_numel: int, cell: tuple[int, int]) -> None:
    assert TileGrid((16, 10), 0, world_size=2, max_numel=max_numel).cell == cell


def test_tiles_of_an_uneven_shard_are_smaller_or_empty() -> None:
    grid = TileGrid((5, 3), 0, world_size=4, max_numel=3)
    assert list(grid.cells()) == [(0, 0), (1, 0)]
    shapes = [[grid.tile(owner, cell).shape for cell in grid.cells()] for owner in range(4)]
    assert shapes == [[(1, 3), (1, 3)], [(1, 3), (1, 3)], [(1, 3), (0, 3)], [(0, 3), (0, 3)]]


@given(st.lists(st.integers(0, 5), max_size=4))
def test_strides_are_those_of_a_contiguous_tensor(shape: list[int]) -> None:
    assert contiguous_stride(tuple(shape)) == torch.empty(shape).stride()
