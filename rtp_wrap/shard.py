"""Who owns what: the index arithmetic of shards and tiles. Numbers; no tensor's data is looked at.

A weight of shape ``[rows, cols, ...]`` is cut along one of its first two dimensions into one home
shard per rank, and each shard into a grid of cells so that a cell fits a staging slot. The part of
one owner's shard that lies in one cell is a tile: a rectangle of the weight, given in the weight's
own indices. Sharding either dimension, cutting a shard into pieces and owners with less than the
others (or nothing) are then one case: the rectangles differ, the arithmetic of the products does
not. Further dimensions (the kernel of a convolution) are never cut.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Shard


def extent(size: int, world_size: int, rank: int) -> tuple[int, int]:
    """The half-open index range that ``rank`` owns of a dimension of ``size`` elements.

    The ranges are those of ``torch.chunk`` and of DTensor's ``Shard``: every rank has
    ``ceil(size / world_size)`` elements except the last ones, which have fewer or none.
    """
    chunk = -(-size // world_size)
    start = min(rank * chunk, size)
    return start, min(start + chunk, size)


def local_shape(
    shape: tuple[int, ...], dim: int | None, world_size: int, rank: int
) -> tuple[int, ...]:
    """The shape of what ``rank`` has of a tensor that is sharded along ``dim``, or not at all."""
    if dim is None:
        return shape
    start, stop = extent(shape[dim], world_size, rank)
    return (*shape[:dim], stop - start, *shape[dim + 1 :])


@dataclass(frozen=True, slots=True)
class Tile:
    """A rectangle of a weight's first two dimensions, half-open, in indices of the whole weight."""

    row: int
    row_end: int
    col: int
    col_end: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.row_end - self.row, self.col_end - self.col

    @property
    def numel(self) -> int:
        rows, cols = self.shape
        return rows * cols

    @property
    def rows(self) -> slice:
        return slice(self.row, self.row_end)

    @property
    def cols(self) -> slice:
        return slice(self.col, self.col_end)

    def within(self, outer: Tile) -> tuple[slice, slice]:
        """The index that picks this tile out of a tensor that holds ``outer``."""
        return (
            slice(self.row - outer.row, self.row_end - outer.row),
            slice(self.col - outer.col, self.col_end - outer.col),
        )


@dataclass(frozen=True)
class TileGrid:
    """How a sharded weight is cut into tiles of at most ``max_numel`` elements.

    Every owner's shard is cut by the same cells, so that all ranks agree on the number of hops
    without talking; in an uneven shard the last cells are smaller, or empty. ``max_numel`` must
    hold at least one kernel (``shape[2:]``).
    """

    shape: tuple[int, ...]
    dim: int
    world_size: int
    max_numel: int

    def shard(self, owner: int) -> Tile:
        rows, cols = self.shape[:2]
        if self.dim == 0:
            return Tile(*extent(rows, self.world_size, owner), 0, cols)
        return Tile(0, rows, *extent(cols, self.world_size, owner))

    @functools.cached_property  # every tile of every step asks
    def cell(self) -> tuple[int, int]:
        """Rows and columns of a cell: whole rows if one fits, cut in nearly equal pieces."""
        rows, cols = self.shard(0).shape  # owner 0 has the largest shard
        limit = self.max_numel // max(1, math.prod(self.shape[2:]))
        cell_cols = _piece(cols, limit)
        cell_rows = _piece(rows, max(1, limit // cell_cols))
        return cell_rows, cell_cols

    def cells(self) -> Iterator[tuple[int, int]]:
        """Offsets (row, column) of the cells within a shard, row by row."""
        rows, cols = self.shard(0).shape
        cell_rows, cell_cols = self.cell
        for row in range(0, rows, cell_rows):
            for col in range(0, cols, cell_cols):
                yield row, col

    def tile(self, owner: int, offset: tuple[int, int]) -> Tile:
        """The part of ``owner``'s shard in the cell at ``offset``."""
        shard = self.shard(owner)
        cell_rows, cell_cols = self.cell
        row = min(shard.row + offset[0], shard.row_end)
        col = min(shard.col + offset[1], shard.col_end)
        return Tile(
            row, min(row + cell_rows, shard.row_end), col, min(col + cell_cols, shard.col_end)
        )

    def tile_shape(self, tile: Tile) -> tuple[int, ...]:
        """The shape of a tensor that holds ``tile``."""
        return (*tile.shape, *self.shape[2:])


def _piece(size: int, limit: int) -> int:
    """The size of pieces of ``size``, of <= ``limit``; the last one may be smaller.

    They are few and nearly equal, and begin at multiples of 128, or of so many that no more than
    an eighth of ``limit`` is lost. That is for the products: a piece of activations that begins at
    an odd address is read without the tensor memory accelerator, which takes multiples of 16 bytes,
    and a product then takes a multiple of the time (benchmarks/README.md).
    """
    if size <= limit:
        return max(1, size)
    multiple = next(each for each in (128, 64, 32, 16, 8, 1) if limit >= 8 * each or each == 1)
    pieces = -(-size // (limit - limit % multiple))
    return -(-size // (pieces * multiple)) * multiple


def contiguous_stride(shape: torch.Size | tuple[int, ...]) -> tuple[int, ...]:
    """Strides, in elements, of a contiguous tensor of ``shape``."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * max(1, size))
    return tuple(reversed(strides)) if len(shape) else ()


def sharded_dim(weight: DTensor) -> int:
    """The dimension along which a weight is sharded, by the last dimension of its mesh."""
    placement = weight.placements[-1]
    assert isinstance(placement, Shard)
    return placement.dim


def dtensor_like(local: torch.Tensor, other: DTensor) -> DTensor:
    """``local`` as this rank's part of a DTensor of the shape and placements of ``other``.

    ``DTensor.from_local`` takes the host much longer, and so does ``DTensor(...)``, by which FSDP2
    makes gradients: it keeps Dynamo out of an ``__init__`` that does nothing.
    """
    return DTensor.__new__(DTensor, local, other._spec, requires_grad=False)


def dtensor_of(
    local: torch.Tensor, mesh: DeviceMesh, placements: Sequence[Placement], shape: torch.Size
) -> DTensor:
    """The contiguous DTensor of ``shape`` of which this rank has ``local``; nothing is compared."""
    # Without shape and stride, DTensor would take all shards for as large as this one.
    return DTensor.from_local(
        local,
        mesh,
        placements,
        run_check=False,
        shape=shape,
        stride=contiguous_stride(shape),
    )
