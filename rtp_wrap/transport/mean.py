"""The mean of all ranks' parts of a gradient, where they have met."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from rtp_wrap.transport.cells import Landing

_Stream = torch.cuda.Stream | None
_Kernel = Callable[[torch.Tensor, torch.Tensor, int, torch.Tensor, torch.dtype, _Stream], None]


def put_mean(
    own: torch.Tensor,
    landing: Landing,
    rank: int,
    out: torch.Tensor,
    sums: torch.dtype,
    stream: _Stream = None,
) -> None:
    """``out = (own + sum of landing.parts[r] for other ranks r) / ranks``, summed in ``sums``.

    ``own`` and ``out`` are ``[*tile]``; ``own`` is contiguous, and of the dtype of the other parts.
    16-bit ``sums`` are added in fp32 and rounded once. On ``stream``, default: the current one.
    """
    kernel = _kernel() if out.is_cuda and out.is_contiguous() and own.itemsize > 1 else None
    if kernel is not None:
        kernel(own, landing.parts, rank, out, sums, stream)
    elif stream is None:
        _put_mean(own, landing, out, sums)
    else:
        with torch.cuda.stream(stream):
            _put_mean(own, landing, out, sums)


def _put_mean(own: torch.Tensor, landing: Landing, out: torch.Tensor, sums: torch.dtype) -> None:
    parts = landing.parts
    if len(parts) == 2 and own.dtype == sums == out.dtype and sums.itemsize > 2:
        # As DDP does, to the bit: `lerp` rounds once more. The sum of 16 bits could overflow.
        torch.add(own, landing.other, out=out).mul_(0.5)
        return
    landing.own.copy_(own)
    if sums == out.dtype:
        torch.mean(parts, 0, dtype=sums, out=out)
    else:
        out.copy_(torch.mean(parts, 0, dtype=sums))


@functools.cache
def _kernel() -> _Kernel | None:
    """One pass over everything; ``None`` where Triton is missing."""
    try:
        from rtp_wrap.transport.mean_kernel import put_mean
    except ImportError:
        return None
    return put_mean
