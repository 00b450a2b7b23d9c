"""The oracle: the unsharded model in one process on the whole batch, step by step.

``check_parity`` runs on every rank. It trains a wrapped copy of a model on this rank's own part of
the data, the dense original on all of it, and compares outputs, gradients and weights after every
step, with the loss of the step before still alive.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from rtp_wrap import RotatedTensorParallel
from tests.ranks import device

#: fp64: sums over ranks and tiles are in another order than in the dense model, nothing else is,
#: so what differs is the last few of 53 bits, grown over a few steps.
FP64 = {"rtol": 1e-9, "atol": 1e-11}

Build = Callable[[], nn.Module]
#: (step, rank) -> the arguments of the model's forward on that rank, equally many samples each.
Batch = Callable[[int, int], tuple[Any, ...]]


def full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor, of a DTensor or a plain one. All ranks call it together."""
    return fulls([tensor])[0]


def fulls(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """The whole of each tensor, in one exchange: ten would take ten times as long."""
    wholes: list[Any] = list(tensors)
    by_group = defaultdict(list)  # places and dimensions of shards
    for index, tensor in enumerate(wholes):
        if not isinstance(tensor, DTensor):
            continue
        placement, mesh = tensor.placements[-1], tensor.device_mesh
        if isinstance(placement, Shard) and tensor.is_cpu and not tensor.requires_grad:
            by_group[mesh.get_group(mesh.ndim - 1)].append((index, placement.dim))
        else:
            wholes[index] = tensor.full_tensor()
    # Not ``full_tensor`` in a row: Gloo corrupts the heap by it (see ``rtp_wrap.gather``).
    for group, places in by_group.items():
        own = [wholes[index].to_local().movedim(dim, 0) for index, dim in places]
        # NumPy's arrays are pickled in a fraction of the time of tensors. It has no bf16, and bytes
        # need other strides than some tensors of one element have.
        arrays = [
            each.clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy()
            for each in own
        ]
        shards: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(shards, arrays, group=group)
        for (index, dim), parts in zip(places, zip(*shards, strict=True), strict=True):
            whole = torch.cat([torch.from_numpy(part) for part in parts])
            wholes[index] = whole.view(wholes[index].dtype).movedim(0, dim).contiguous()
    return wholes


def mean_square(output: Any) -> torch.Tensor:
    """A loss that every output contributes to, averaged over samples as DDP expects."""
    if isinstance(output, torch.Tensor):
        return (output - 0.5).square().mean()
    return sum((mean_square(part) for part in output if part is not None), torch.tensor(0.0))


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """SGD with momentum: unlike Adam it does not blow up gradients that are zero up to noise."""
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def cat_ranks(parts: list[Any], dim: int = 0) -> Any:
    """The ranks' arguments as those of the whole batch: tensors joined along ``dim``."""
    if isinstance(parts[0], torch.Tensor):
        return torch.cat(parts, dim)
    assert all(part == parts[0] for part in parts), "only tensors may differ between ranks"
    return parts[0]


def check_parity(
    build: Build,
    batch: Batch,
    *,
    steps: int = 3,
    loss: Callable[[Any], torch.Tensor] = mean_square,
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] = sgd,
    dtype: torch.dtype = torch.float64,
    tolerance: dict[str, float] = FP64,
    batch_dim: int = 0,
    prepare: Callable[[nn.Module], None] = lambda module: None,
    convert: Callable[[nn.Module], nn.Module] = lambda module: module,
    **wrap: Any,
) -> RotatedTensorParallel:
    """Train both models and compare them; ``wrap`` are arguments of the wrapper.

    ``build`` makes the model from the current random state (seeded here alike on all ranks, then
    differently: only rank 0's weights may count). ``prepare`` is applied to both models before
    wrapping, e.g. to freeze layers, and ``convert`` to the one that is wrapped. Returns the trained
    wrapped model.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    dense = build().to(device(), dtype)
    prepare(dense)
    mine = convert(deepcopy(dense))
    if rank > 0:
        with torch.no_grad():
            for parameter in mine.parameters():
                if parameter.is_floating_point():
                    parameter.add_(rank)
    wrapped = RotatedTensorParallel(mine, **wrap)
    dense_optimizer, optimizer_ = optimizer(dense.parameters()), optimizer(wrapped.parameters())
    kept = []
    for step in range(steps):
        parts = [_to(batch(step, r), dtype) for r in range(world_size)]
        whole = tuple(cat_ranks(list(column), batch_dim) for column in zip(*parts, strict=True))
        dense_output, output = dense(*whole), wrapped(*parts[rank])
        _compare_outputs(dense_output, output, rank, world_size, batch_dim, tolerance)
        dense_loss, own_loss = loss(dense_output), loss(output)
        kept.append(own_loss)  # the original's gradients were wrong with the last loss alive
        dense_optimizer.zero_grad()
        optimizer_.zero_grad()
        dense_loss.backward()
        own_loss.backward()
        compare_gradients(dense, wrapped, tolerance, f"step {step}")
        dense_optimizer.step()
        optimizer_.step()
        compare_weights(dense, wrapped, tolerance, f"step {step}")
    return wrapped


def compare_gradients(
    dense: nn.Module, wrapped: nn.Module, tolerance: dict[str, float] = FP64, when: str = ""
) -> None:
    """Gradients of equal presence and value, by fqn."""
    theirs = dict(dense.named_parameters())
    ours = dict(wrapped.named_parameters())
    assert list(theirs) == list(ours)
    for fqn, parameter in ours.items():
        present = theirs[fqn].grad is not None
        assert (parameter.grad is not None) == present, f"{when}: {fqn}.grad presence"
    gradients = {fqn: p.grad for fqn, p in ours.items() if p.grad is not None}
    for fqn, gradient in zip(gradients, fulls(gradients.values()), strict=True):
        torch.testing.assert_close(
            gradient, theirs[fqn].grad, **tolerance, msg=_named(f"{when}: {fqn}.grad")
        )


def compare_weights(
    dense: nn.Module, wrapped: nn.Module, tolerance: dict[str, float] = FP64, when: str = ""
) -> None:
    """Weights of equal value, by fqn."""
    theirs = dict(dense.named_parameters())
    ours = dict(wrapped.named_parameters())
    for fqn, weight in zip(ours, fulls(p.detach() for p in ours.values()), strict=True):
        torch.testing.assert_close(
            weight, theirs[fqn].detach(), **tolerance, msg=_named(f"{when}: {fqn}")
        )


def _compare_outputs(
    dense: Any, ours: Any, rank: int, world_size: int, dim: int, tolerance: dict[str, float]
) -> None:
    if isinstance(dense, torch.Tensor):
        if dense.dim() > 0:
            dense = dense.chunk(world_size, dim)[rank]
        torch.testing.assert_close(ours, dense, **tolerance, msg=_named("output"))
    elif dense is not None:
        for theirs, own in zip(dense, ours, strict=True):
            _compare_outputs(theirs, own, rank, world_size, dim, tolerance)


def _to(arguments: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    return tuple(
        value.to(device(), dtype if value.is_floating_point() else value.dtype)
        if isinstance(value, torch.Tensor)
        else value
        for value in arguments
    )


def _named(what: str) -> Callable[[str], str]:
    return lambda message: f"{what}: {message}"
