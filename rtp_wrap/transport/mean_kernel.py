"""The mean of parts in one pass: torch's needs a copy of the own part beside the others first.

Needs Triton, which comes with torch's builds for CUDA. What is averaged here shares the GPU with
matrix products, so that its time is theirs.
"""

from __future__ import annotations

from collections.abc import Callable

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


#: What launches a compiled kernel, and its arguments behind the pointers, by all that it was
#: compiled for. ``triton.jit`` finds that out at each launch, which takes the host longer.
_compiled: dict[tuple[object, ...], tuple[Callable[..., None], tuple[object, ...]]] = {}


def put_mean(
    own: torch.Tensor,
    parts: torch.Tensor,
    rank: int,
    out: torch.Tensor,
    sums: torch.dtype,
    stream: torch.cuda.Stream | None = None,
) -> None:
    """``out = (own + sum of parts[r] for other ranks r) / ranks``; ``parts[rank]`` is not read.

    ``own`` and ``out`` are ``[*tile]``, ``parts`` is ``[ranks, *tile]``; all contiguous, of 16, 32
    or 64 bits, on the current device. On ``stream``, default: the current one, without waiting.
    """
    numel, ranks = own.numel(), parts.shape[0]
    pointers = own.data_ptr(), parts.data_ptr(), out.data_ptr()
    alignments = [each % 16 == 0 for each in pointers]
    key = (out.device.index, numel, ranks, rank, own.dtype, out.dtype, sums, *alignments)
    compiled = _compiled.get(key)
    if compiled is not None:
        launch, arguments = compiled
        launch(*pointers, *arguments, stream=None if stream is None else stream.cuda_stream)
        return
    grid = (triton.cdiv(numel, _BLOCK), 1, 1)
    added_in = tl.float64 if torch.float64 in (own.dtype, sums) else tl.float32
    arguments = numel, ranks, rank, added_in, _DTYPES[sums], _BLOCK
    with torch.cuda.stream(stream):
        kernel = _put_mean[grid](own, parts, out, *arguments)
    if kernel is not None:  # it is where it is interpreted
        _compiled[key] = kernel[grid], arguments


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
