"""Sums of the rows of equal ids, each put where it belongs, in one kernel.

Needs Triton, which comes with torch's builds for CUDA. One program sums one block of columns of one
row of the result: ids are sorted, so what it needs is listed in one piece. Rows of no id are zeros.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

#: Columns of a program at most, and rows that it loads at a time.
_BLOCK, _AT_ONCE = 1024, 8


def sum_rows(
    dy: torch.Tensor,
    order: torch.Tensor,
    bounds: torch.Tensor,
    row: int,
    padding: int,
    by_freq: bool,
    out: torch.Tensor,
) -> None:
    """``out[v] = sum of dy[order[i]]`` for ``i`` from ``bounds[row + v]`` to the next one.

    ``dy`` is ``[T, C]``, ``out`` is ``[n, C]``, both of 16, 32 or 64 bits and of any strides;
    ``order`` and ``bounds`` are contiguous. Row ``padding``, as counted in ``bounds``, is zero;
    with ``by_freq`` rows are means. Sums are in fp32, or fp64 for fp64. On the current stream,
    without waiting for it; shapes depend on no values, so it can be captured in a graph.
    """
    n, cols = out.shape
    if not out.numel():
        return
    block = min(triton.next_power_of_2(cols), _BLOCK)
    with torch.cuda.device_of(out):
        _sum_rows[n, triton.cdiv(cols, block)](
            dy,
            order,
            bounds,
            out,
            row,
            padding,
            cols,
            *dy.stride(),
            *out.stride(),
            BY_FREQ=by_freq,
            ADDED_IN=tl.float64 if dy.dtype == torch.float64 else tl.float32,
            AT_ONCE=_AT_ONCE,
            BLOCK=block,
            num_warps=max(1, min(4, block // 256)),
        )


@triton.jit(do_not_specialize=["row", "padding"])  # one kernel for all tiles of a table
def _sum_rows(  # type: ignore[no-untyped-def]
    dy,
    order,
    bounds,
    out,
    row,
    padding,
    cols,
    dy_rows,
    dy_cols,
    out_rows,
    out_cols,
    BY_FREQ: tl.constexpr,
    ADDED_IN: tl.constexpr,
    AT_ONCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    v = tl.program_id(0).to(tl.int64)
    first = tl.load(bounds + row + v)
    last = tl.load(bounds + row + v + 1)
    if row + v == padding:
        last = first
    columns = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    inside = columns < cols
    total = tl.full((BLOCK,), 0, ADDED_IN)
    at = first
    while at < last:
        for ahead in tl.static_range(AT_ONCE):  # loads that do not wait for each other
            wanted = at + ahead < last
            t = tl.load(order + at + ahead, mask=wanted, other=0)
            values = tl.load(dy + t * dy_rows + columns * dy_cols, mask=inside & wanted, other=0)
            total += values.to(ADDED_IN)
        at += AT_ONCE
    if BY_FREQ:
        total /= tl.maximum(last - first, 1).to(ADDED_IN)
    where = out + v * out_rows + columns * out_cols
    tl.store(where, total.to(out.dtype.element_ty), mask=inside)
