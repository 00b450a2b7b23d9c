"""Replicated parameters: one autograd node that averages the gradients of all of them.

The node's outputs are the parameters as plain tensors. It sits between them and their uses, so its
backward runs once per backward pass, after all uses are done, whatever the entry was: a loss,
accumulation, ``retain_graph``, ``autograd.grad``, a recomputed block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from rtp_wrap.double_backward import refuse_double_backward
from rtp_wrap.ring import Ring, resolve
from rtp_wrap.written import WriteCheck

#: Gradients are averaged in buffers of about this many bytes, to bound the copy.
BUCKET_BYTES = 32 << 20


def replicated(
    parameters: Sequence[DTensor], ring: Ring, fqns: Sequence[str]
) -> tuple[torch.Tensor, ...]:
    """The parameters as plain tensors on which the gradients are averaged over the ring.

    All ranks must run the backward of the same calls. Gradients are summed in fp32 for 16-bit
    parameters, otherwise in the parameter's dtype.
    """
    plain: list[torch.Tensor] = [parameter._local_tensor.detach() for parameter in parameters]
    if torch.is_grad_enabled():
        trained = [index for index, p in enumerate(parameters) if p.requires_grad]
        if trained:
            outputs = _AverageGradients.apply(
                ring.key, [fqns[index] for index in trained], *[parameters[i] for i in trained]
            )
            for index, output in zip(trained, outputs, strict=True):
                plain[index] = output
    return tuple(plain)


class _AverageGradients(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, key: str, fqns: list[str], *parameters: DTensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.ring, ctx.fqns, ctx.parameters = resolve(key), fqns, parameters
        ctx.written = [WriteCheck(p, n, ctx.ring) for p, n in zip(parameters, fqns, strict=True)]
        return tuple(parameter._local_tensor.detach() for parameter in parameters)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[DTensor | None, ...]:
        refuse_double_backward(ctx.fqns[0])
        ring: Ring = ctx.ring
        for written in ctx.written:
            written.check()
        used = [index for index, grad in enumerate(grads) if grad is not None]
        # A rank that used others would average the wrong elements: part of what is compared.
        first = ctx.fqns[used[0]] if used else "none"
        ring.begin(f"average of {len(used)} gradients, {first} and on {used}")
        results: list[DTensor | None] = [None] * len(grads)
        for bucket in _buckets([(index, _dense(grads[index])) for index in used]):
            for (index, _), mean in zip(bucket, _mean([g for _, g in bucket], ring), strict=True):
                parameter = ctx.parameters[index]
                results[index] = DTensor.from_local(
                    mean, parameter.device_mesh, parameter.placements, run_check=False
                )
        return (None, None, *results)


def _dense(grad: Any) -> Any:
    return grad.to_dense() if grad.is_sparse else grad


def _buckets(grads: list[tuple[int, Any]]) -> list[list[tuple[int, torch.Tensor]]]:
    """Neighbours of one dtype, up to ``BUCKET_BYTES`` together."""
    buckets: list[list[tuple[int, torch.Tensor]]] = []
    room = 0
    for index, grad in grads:
        if not buckets or grad.nbytes > room or grad.dtype != buckets[-1][-1][1].dtype:
            buckets.append([])
            room = BUCKET_BYTES
        buckets[-1].append((index, grad))
        room -= grad.nbytes
    return buckets


def _mean(grads: list[torch.Tensor], ring: Ring) -> list[torch.Tensor]:
    dtype = grads[0].dtype
    wide = torch.float32 if dtype.itemsize < 4 else dtype
    flat = torch.cat([grad.reshape(-1).to(wide) for grad in grads])
    if ring.world_size > 1:
        dist.all_reduce(flat, group=ring.group)
        flat.div_(ring.world_size)
    parts = flat.split([grad.numel() for grad in grads])
    # Each in memory of its own: a DTensor with a storage offset has no deepcopy.
    return [
        part.to(dtype, copy=True).view(grad.shape) for part, grad in zip(parts, grads, strict=True)
    ]
