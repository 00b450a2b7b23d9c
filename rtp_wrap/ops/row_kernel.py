"""Rows by their ids out of the memories of several GPUs, in one kernel.

Needs Triton, which comes with torch's builds for CUDA. One program copies one block of columns of
one row: ids choose the rank, and what travels between GPUs are the rows that are wanted.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rtp_wrap.transport.cells import ALIGNMENT, Published

#: Bytes of a row that one program copies at most, and that one of its warps loads at a time.
_BLOCK_BYTES, _WARP_BYTES = 2048, 32 * ALIGNMENT


def copy_rows(published: Published, ids: torch.Tensor, y: torch.Tensor) -> None:
    """Put the rows of ``ids`` that lie in ``published`` into ``y``; other rows stay as they are.

    ``ids`` is int32 or int64 ``[T]``, of any stride; ``y`` is ``[T, D]``, contiguous, of the tiles'
    dtype and of any values: nothing is computed with them. On the current stream, without waiting
    for it; shapes depend on no values, so it can be captured in a graph.
    """
    tile, _ = published[0]
    cols = tile.shape[1]
    # Integers of the same size: all bits are copied, and dtypes that Triton has no name for, too.
    bits = y.view(_INTEGERS[y.dtype.itemsize])
    block = min(triton.next_power_of_2(cols), _BLOCK_BYTES // y.dtype.itemsize)
    grid = len(ids), triton.cdiv(cols, block)
    if not len(ids):
        return
    with torch.cuda.device_of(y):
        _copy_rows[grid](
            ids,
            bits,
            published.addresses,
            published.at,
            published.shard_rows,
            published.row,
            published.rows,
            tile.col,
            cols,
            ids.stride(0),
            y.shape[1],
            ALIGNMENT=ALIGNMENT,
            BLOCK=block,
            num_warps=max(1, min(4, block * y.dtype.itemsize // _WARP_BYTES)),
        )


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit
def _copy_rows(  # type: ignore[no-untyped-def]
    ids,
    y,
    addresses,
    at,
    shard_rows,
    row,
    rows,
    col,
    cols,
    ids_stride,
    y_cols,
    ALIGNMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    wanted = tl.load(ids + t * ids_stride).to(tl.int64)
    owner = wanted // shard_rows
    local = wanted - owner * shard_rows - row
    if (local >= 0) & (local < rows):
        start = tl.load(addresses + owner) + at
        # Wide loads need to know; that rows are as well aligned, or not, is seen from ``cols``.
        tile = tl.multiple_of(start.to(tl.pointer_type(y.dtype.element_ty)), ALIGNMENT)
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = columns < cols
        values = tl.load(tile + local * cols + columns, mask=inside)
        tl.store(y + t * y_cols + col + columns, values, mask=inside)
