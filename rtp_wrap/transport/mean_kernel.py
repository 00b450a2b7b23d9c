"""The mean of parts in one pass: torch's needs a copy of the own part beside the others first.

Needs Triton, which comes with torch's builds for CUDA. What is averaged here shares the GPU with
matrix products, so that its time is theirs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

#: Elements that one program averages.
_BLOCK = 2048

_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


def put_mean(
    own: torch.Tensor, parts: torch.Tensor, rank: int, out: torch.Tensor, sums: torch.dtype
) -> None:
    """``out = (own + sum of parts[r] for other ranks r) / ranks``; ``parts[rank]`` is not read.

    ``own`` and ``out`` are ``[*tile]``, ``parts`` is ``[ranks, *tile]``; all contiguous, of 16, 32
    or 64 bits. On the current stream, without waiting for it.
    """
    numel = own.numel()
    wide = torch.float64 in (own.dtype, sums)
    with torch.cuda.device_of(out):
        _put_mean[(triton.cdiv(numel, _BLOCK),)](
            own,
            parts,
            out,
            numel,
            RANKS=len(parts),
            RANK=rank,
            ADDED_IN=tl.float64 if wide else tl.float32,
            SUMS=_DTYPES[sums],
            BLOCK=_BLOCK,
        )


@triton.jit
def _put_mean(  # type: ignore[no-untyped-def]
    own,
    parts,
    out,
    numel,
    RANKS: tl.constexpr,
    RANK: tl.constexpr,
    ADDED_IN: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    total = tl.load(own + at, mask=inside, other=0).to(ADDED_IN)
    here = at
    for rank in tl.static_range(RANKS):
        if rank != RANK:
            total += tl.load(parts + here, mask=inside, other=0).to(ADDED_IN)
        here += numel
    # On GPUs a quotient in fp32 is an approximation, and half of a sum is exact.
    mean = (total * 0.5 if RANKS == 2 else total / RANKS).to(SUMS)
    tl.store(out + at, mean.to(out.dtype.element_ty), mask=inside)
