"""Replicated parameters: one autograd node that averages the gradients of all of them.

The node's outputs are the parameters as plain tensors. It sits between them and their uses, so its
backward runs once per backward pass, after all uses are done, whatever the entry was: a loss,
accumulation, ``retain_graph``, ``autograd.grad``, a recomputed block.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from rtp_wrap.collective import collective
from rtp_wrap.double_backward import refuse_double_backward
from rtp_wrap.gradient import Gradient, deliver
from rtp_wrap.ring import Ring
from rtp_wrap.shard import dtensor_like
from rtp_wrap.written import WriteCheck

#: Gradients are averaged in buffers of about this many bytes, to bound the copy.
BUCKET_BYTES = 32 << 20


def replicated(
    parameters: Sequence[DTensor],
    ring: Ring,
    fqns: Sequence[str],
    dtypes: Sequence[torch.dtype],
) -> tuple[torch.Tensor, ...]:
    """The parameters as plain tensors on which the gradients are averaged over all ranks.

    All ranks must run the backward of the same calls. They read in ``dtypes``, and gradients are
    summed in that of the ring's precision policy (by default in fp32 for 16-bit parameters,
    otherwise in the parameter's dtype).
    """
    trained = [index for index, each in enumerate(parameters) if each.requires_grad]
    averaged: dict[int, torch.Tensor] = {}
    if trained and torch.is_grad_enabled():
        outputs = _AverageGradients.apply(
            ring,
            [fqns[index] for index in trained],
            [dtypes[index] for index in trained],
            *[parameters[index] for index in trained],
        )
        averaged = dict(zip(trained, outputs, strict=True))
    return tuple(
        averaged[index] if index in averaged else _plain(parameter, dtypes[index])
        for index, parameter in enumerate(parameters)
    )


class _AverageGradients(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, ring: Ring, fqns: list[str], dtypes: list[torch.dtype], *parameters: DTensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.ring, ctx.fqns, ctx.parameters = ring, fqns, parameters
        ctx.written = [WriteCheck(p, n, ring) for p, n in zip(parameters, fqns, strict=True)]
        return tuple(
            _plain(parameter, dtype) for parameter, dtype in zip(parameters, dtypes, strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[DTensor | None, ...]:
        refuse_double_backward(ctx.fqns[0])
        ring: Ring = ctx.ring
        used = [index for index, grad in enumerate(grads) if grad is not None]
        for index in used:
            ctx.written[index].check()
        # A rank that used others would average the wrong elements, and buffers of other sizes end a
        # process in Gloo and hang in NCCL. So ranks compare first, also where a rank used none.
        first = ctx.fqns[used[0]] if used else "none"
        ring.begin(f"average of {len(used)} gradients, {first} and on {used}")
        ring.lockstep.verify("an average of gradients")
        results: list[DTensor | None] = [None] * len(grads)
        following = ctx.next_functions
        dense = [(index, _dense(grads[index])) for index in used]
        dtypes = [ring.precision.average_dtype(each.dtype) for each in ctx.parameters]
        with collective("average", f"{first} and {max(0, len(used) - 1)} more", ring):
            for bucket in _buckets(dense, dtypes):
                means = _mean(bucket, ring)
                parameters = [ctx.parameters[index] for index, _ in bucket.grads]
                # In memory of its own: a DTensor with a storage offset has no deepcopy.
                own = [
                    torch.empty(each.shape, dtype=each.dtype, device=ring.device)
                    for each in parameters
                ]
                torch._foreach_copy_([_flat(each) for each in own], means)
                for (index, _), parameter, mean in zip(bucket.grads, parameters, own, strict=True):
                    gradient = Gradient(dtensor_like(mean, parameter), None)
                    results[index] = deliver(parameter, following[index][0], gradient)
        return (None, None, None, *results)


def _plain(parameter: DTensor, dtype: torch.dtype) -> torch.Tensor:
    return parameter._local_tensor.detach().to(dtype)


def _dense(grad: Any) -> Any:
    return grad.to_dense() if grad.is_sparse else grad


@dataclass
class _Bucket:
    """Neighbours that are summed together, in one dtype: (index, gradient) each."""

    dtype: torch.dtype
    grads: list[tuple[int, torch.Tensor]]
    room: int


def _buckets(
    grads: Iterable[tuple[int, torch.Tensor]], dtypes: Sequence[torch.dtype]
) -> list[_Bucket]:
    """``dtypes`` are by index."""
    buckets: list[_Bucket] = []
    for index, grad in grads:
        dtype = dtypes[index]
        nbytes = grad.numel() * dtype.itemsize
        if not buckets or nbytes > buckets[-1].room or dtype != buckets[-1].dtype:
            buckets.append(_Bucket(dtype, [], BUCKET_BYTES))
        buckets[-1].grads.append((index, grad))
        buckets[-1].room -= nbytes
    return buckets


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` with one dimension, as most replicated parameters have."""
    return tensor if tensor.dim() == 1 else tensor.reshape(-1)


def _mean(bucket: _Bucket, ring: Ring) -> list[torch.Tensor]:
    """The averages, flat: views of one buffer."""
    grads = [_flat(grad) for _, grad in bucket.grads]
    sizes = [grad.numel() for grad in grads]
    flat = grads[0].new_empty(sum(sizes), dtype=bucket.dtype)
    parts = list(flat.split(sizes))
    # One kernel for very many copies, casts included, as FSDP2 fills its buffers.
    torch._foreach_copy_(parts, grads)
    ring.rings.average(flat)
    return parts
