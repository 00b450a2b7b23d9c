"""Home shards: where the parameters of a wrapped model live, and how they get there.

Rank 0's values reach the other ranks piece by piece through one small buffer on the device, and
each rank keeps what it owns. No rank gets a whole sharded parameter on the device for that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from rtp_wrap.assign import Assignment
from rtp_wrap.materialise import ParamInitFn, materialise
from rtp_wrap.mesh import placements
from rtp_wrap.names import own_names
from rtp_wrap.policy import Ignore, Replicate, Strategy, shard_dim
from rtp_wrap.ring import Ring, register, retire
from rtp_wrap.shard import dtensor_of, extent, local_shape

#: The size of a piece of a parameter on its way to its owner, in bytes.
PIECE_BYTES = 16 << 20


def settle(
    parameter: nn.Parameter, home: Strategy, ring: Ring, values: torch.Tensor | None = None
) -> nn.Parameter:
    """The DTensor parameter that holds this rank's part of rank 0's ``parameter``.

    Sharded along ``home.dim`` for ``Rotate`` and ``Gather`` (ranges of ``torch.chunk``), else
    replicated. dtype, ``requires_grad`` and attributes are kept; values come from rank 0. A
    parameter on the meta device has none: they are given as ``values``.
    """
    whole = parameter.detach() if values is None else values
    shape = whole.shape
    dim = shard_dim(home)
    assert (dim is None) == isinstance(home, Replicate)
    start, stop = (0, 0) if dim is None else extent(shape[dim], ring.world_size, ring.rank)
    own_shape = local_shape(shape, dim, ring.world_size, ring.rank)
    local = torch.empty(own_shape, dtype=whole.dtype, device=ring.device)
    # Cut along dim 0, whatever is sharded: pieces are contiguous in rank 0's memory.
    for at, piece in _pieces(whole, ring):
        end = at + piece.shape[0]
        if dim == 0:
            low, high = max(at, start), min(end, stop)
            if low < high:
                local[low - start : high - start] = piece[low - at : high - at]
        elif dim is None:
            local.view(shape or 1)[at:end] = piece
        else:
            local[at:end] = piece.narrow(dim, start, stop - start)
    mesh = ring.rings.mesh
    dtensor = dtensor_of(local, mesh, placements(mesh, dim), shape)
    settled = nn.Parameter(dtensor, requires_grad=parameter.requires_grad)
    vars(settled).update(vars(parameter))
    register(settled, ring)
    return settled


def settle_buffer(buffer: torch.Tensor, ring: Ring) -> torch.Tensor:
    """Rank 0's buffer, whole, on the ring's device."""
    local = torch.empty_like(buffer, device=ring.device, memory_format=torch.contiguous_format)
    flat = local.view(-1)
    for at, piece in _pieces(buffer.detach().reshape(-1), ring):
        flat[at : at + piece.shape[0]] = piece
    return local


def _pieces(whole: torch.Tensor, ring: Ring) -> Iterator[tuple[int, torch.Tensor]]:
    """Rank 0's tensor on every rank, in pieces along dim 0, each with its offset."""
    if whole.dim() == 0:
        whole = whole.view(1)
    if whole.numel() == 0:
        return
    row_bytes = whole[0].numel() * whole.itemsize
    rows = max(1, PIECE_BYTES // row_bytes)
    for at in range(0, whole.shape[0], rows):
        part = whole[at : at + rows]
        piece = torch.empty(part.shape, dtype=part.dtype, device=ring.device)
        if ring.rings.place == 0:
            piece.copy_(part)
        # As bytes: backends do not know every dtype that a parameter may have.
        ring.rings.broadcast(piece.view(-1).view(torch.uint8))
        yield at, piece


def settle_model(
    module: nn.Module,
    assignments: list[Assignment],
    ring: Ring,
    param_init_fn: ParamInitFn | None,
) -> None:
    """Replace parameters and buffers by rank 0's, module by module and one at a time.

    The assignments take over the new parameters, so that each old one can be freed before the next.
    What is on the meta device gets its values just before its module's turn.
    """
    parameters: dict[nn.Module, list[int]] = {}
    for index, each in enumerate(assignments):
        if not isinstance(each.home, Ignore):
            parameters.setdefault(each.uses[0].module, []).append(index)
    buffers = _buffers(module)
    for fqn, inner in own_names(module):
        values = materialise(fqn, inner, ring, param_init_fn)
        for index in parameters.get(inner, ()):
            assignments[index] = _settled(assignments[index], ring, values)
        for places in buffers.get(inner, ()):
            _, name = places[0]
            present: Any = inner._buffers[name]
            buffer = settle_buffer(values.pop(name, present), ring)
            for place, name in places:
                place._buffers[name] = buffer
        del values  # before the next module has any


def _settled(assignment: Assignment, ring: Ring, values: dict[str, torch.Tensor]) -> Assignment:
    """The assignment with its new parameter, which is now everywhere that the old one was."""
    parameter, home, uses = assignment.parameter, assignment.home, assignment.uses
    settled = settle(parameter, home, ring, values.pop(uses[0].name, None))
    retire(parameter, assignment.fqn)
    for use in uses:
        use.module._parameters[use.name] = settled
    return replace(assignment, parameter=settled)


def _buffers(module: nn.Module) -> dict[nn.Module, list[list[tuple[nn.Module, str]]]]:
    """For each module, the places of those buffers that it is the first to have (tied: several)."""
    places: dict[torch.Tensor, list[tuple[nn.Module, str]]] = {}  # tensors are keys by identity
    for inner in module.modules():
        for name, buffer in inner._buffers.items():
            if buffer is not None:
                places.setdefault(buffer, []).append((inner, name))
    first: dict[nn.Module, list[list[tuple[nn.Module, str]]]] = {}
    for each in places.values():
        first.setdefault(each[0][0], []).append(each)
    return first
