"""The mean of parts in one pass: torch's needs a copy of the own part beside the others first.

Needs Triton, which comes with torch's builds for CUDA. What is averaged here shares the GPU with
matrix products, so that its time is theirs.
"""

from __future__ import annotations

from typing import Any

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


#: What was compiled, by all that it was compiled for. ``triton.jit`` finds that out at each launch,
#: which takes the host several times as long.
_compiled: dict[tuple[object, ...], Any] = {}


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
    numel, ranks, device = own.numel(), parts.shape[0], out.device
    grid = (triton.cdiv(numel, _BLOCK), 1, 1)
    alignments = [each.data_ptr() % 16 == 0 for each in (own, parts, out)]
    key = (device.index, numel, ranks, rank, own.dtype, out.dtype, sums, *alignments)
    kernel = _compiled.get(key)
    if kernel is not None:
        handle = None if stream is None else stream.cuda_stream
        kernel[grid](
            own, parts, out, *_constants(numel, ranks, rank, own.dtype, sums), stream=handle
        )
        return
    with torch.cuda.stream(stream):
        arguments = _constants(numel, ranks, rank, own.dtype, sums)
        # None where it is interpreted.
        _compiled[key] = _put_mean[grid](own, parts, out, *arguments)


def _constants(
    numel: int, ranks: int, rank: int, given: torch.dtype, sums: torch.dtype
) -> tuple[object, ...]:
    """What the kernel is told, in this order, behind the tensors."""
    wide = torch.float64 in (given, sums)
    return numel, ranks, rank, tl.float64 if wide else tl.float32, _DTYPES[sums], _BLOCK


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
