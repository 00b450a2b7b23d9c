"""Rows of a table by their ids, of one tile at a time: ``y[t, C] = W[ids[t], C]``.

``T`` ids of this rank, a table ``W`` of ``V`` rows and ``D`` columns; see ``embedding``.

A rank that can read the others' memory has the choice of two ways to the tiles of the other owners,
who have ``V'`` rows together:

    by rows      every id's row, where it lies          T D elements at most
    by tiles     all of them, then the rows of those    V' D elements

It takes the first one if that is less, however its ids are spread. Ranks need not agree: to the
others it makes no difference. By tiles takes memory for a tile; if the table is a single cell, for
all of it, which is N / (N - 1) times as large as ``y`` at most.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from rtp_wrap.shard import Tile
from rtp_wrap.transport.cells import Published

_CopyRows = Callable[[Published, torch.Tensor, torch.Tensor], None]


class Lookup:
    """The rows of ``ids``, int32 or int64 ``[T]``, are put into ``y``, ``[T, D]``, contiguous.

    The table has ``rows``, of which this rank has ``home_rows``.
    """

    def __init__(self, ids: torch.Tensor, y: torch.Tensor, rows: int, home_rows: int) -> None:
        self._ids, self._y, self._rows = ids, y, rows
        self._by_rows = len(ids) < rows - home_rows

    def product(self, tile: Tile, values: torch.Tensor) -> None:
        """From a tile in this rank's memory; shapes depend on no values."""
        ids, n, out = self._ids, tile.shape[0], self._y[:, tile.cols]
        if n == self._rows:
            torch.index_select(values, 0, ids, out=out)
            return
        local = ids - tile.row
        # Ids outside read rows spread over the tile: all in one place would be slow on a GPU.
        found = values.index_select(0, local.remainder(n))
        inside = (local >= 0) & (local < n)
        torch.where(inside[:, None], found, out, out=out)

    def read(self, published: Published) -> None:
        """From tiles in the memories of their owners."""
        copy_rows = _copier(self._ids.device.type) if self._by_rows else None
        if copy_rows is not None:
            copy_rows(published, self._ids, self._y)
        else:
            for tile, values in published.pulled():
                self.product(tile, values)


def _copy_rows(published: Published, ids: torch.Tensor, y: torch.Tensor) -> None:
    """On the host, where shapes may depend on values."""
    for tile, values in published:
        (found,) = ((ids >= tile.row) & (ids < tile.row_end)).nonzero(as_tuple=True)
        y[:, tile.cols].index_copy_(0, found, values.index_select(0, ids[found] - tile.row))


@functools.cache
def _copier(kind: str) -> _CopyRows | None:
    """By rows on devices of this kind; ``None`` on a GPU where Triton is missing."""
    if kind == "cpu":
        return _copy_rows
    try:
        from rtp_wrap.ops.row_kernel import copy_rows
    except ImportError:
        return None
    return copy_rows
