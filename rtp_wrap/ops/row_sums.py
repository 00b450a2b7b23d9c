"""The gradient of a table of embeddings, of one tile at a time: sums over equal ids.

``T`` ids of this rank, a table of ``V`` rows and ``D`` columns; see ``embedding``:

    dW[v, C] = sum of dy[t, C] over ids[t] = v, for v in R

On a GPU ids are sorted once, which brings equal ones together, and a kernel of ours sums their rows
where the tile is to be. torch's own function sorts them for every tile, and makes a tile of its own
first, with some thirty kernels: that took 0.5 ms a tile of 8192 ids and 4096 columns (H200). It is
taken elsewhere.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from rtp_wrap.ops.products import add_scaled
from rtp_wrap.shard import Tile

_SumRows = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int, int, bool, torch.Tensor], None]


class RowSums:
    """Of ``dy`` ``[T, D]`` over equal ``ids``, int32 or int64 ``[T]``, for a table of ``rows``.

    Row ``padding_idx`` gets zero. ``by_freq`` divides a row by how often it is in ``ids``.
    """

    def __init__(
        self, ids: torch.Tensor, dy: torch.Tensor, rows: int, padding_idx: int | None, by_freq: bool
    ) -> None:
        self._ids, self._dy, self._rows = ids, dy, rows
        self._padding = -1 if padding_idx is None else padding_idx
        self._by_freq = by_freq

    def wgrad(
        self, tile: Tile, start: torch.Tensor | None, out: torch.Tensor, scale: float
    ) -> None:
        """``out = start + scale * sums``; see ``products``."""
        if not len(self._ids):  # nothing to add, and no kernel to launch on nothing
            out.zero_() if start is None else out.copy_(start)
            return
        sum_rows = _kernel(self._dy.device.type)
        if sum_rows is None:
            add_scaled(start, self._by_torch(tile), scale, out=out)
            return
        direct = start is None and scale == 1 and out.dtype == self._dy.dtype
        part = out if direct else self._dy.new_empty(tile.shape)
        dy = self._dy[:, tile.cols]
        sum_rows(dy, *self._order, tile.row, self._padding, self._by_freq, part)
        if not direct:
            add_scaled(start, part, scale, out=out)

    def _by_torch(self, tile: Tile) -> torch.Tensor:
        ids, dy, n = self._ids, self._dy[:, tile.cols], tile.shape[0]
        backward = torch.ops.aten.embedding_dense_backward
        if n == self._rows:
            return backward(dy, ids, n, self._padding, self._by_freq)
        local = ids - tile.row
        outside = (local < 0) | (local >= n) | (ids == self._padding)
        # What is not wanted goes to one row more, which as a padding row costs no additions.
        return backward(dy, local.masked_fill(outside, n), n + 1, n, self._by_freq)[:n]

    @functools.cached_property
    def _order(self) -> tuple[torch.Tensor, torch.Tensor]:
        """By id: the positions in ``ids``; and where those of each row begin and end in them.

        int64 ``[T]`` and int32 ``[V + 1]``. Equal ids keep their order, so sums are the same again.
        """
        # Half as many bits to sort by.
        ids = self._ids.int() if self._rows < 2**31 else self._ids
        ids, order = ids.sort(stable=True)
        rows = torch.arange(self._rows + 1, dtype=ids.dtype, device=ids.device)
        return order, torch.searchsorted(ids, rows, out_int32=True)


@functools.cache
def _kernel(kind: str) -> _SumRows | None:
    """For devices of this kind; ``None`` on CPUs, and on a GPU where Triton is missing."""
    if kind == "cpu":
        return None
    try:
        from rtp_wrap.ops.row_sums_kernel import sum_rows
    except ImportError:
        return None
    return sum_rows
