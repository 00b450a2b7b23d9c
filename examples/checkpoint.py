"""A sharded checkpoint with `torch.distributed.checkpoint`, and the proof that it is whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor


def save(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Write every rank's shards to `folder`; gradients must be `None` or already stepped."""
    parameters, state = get_state_dict(model, optimizer)
    if dist.get_rank() == 0:  # an older checkpoint is none from here on, in case saving fails
        (folder / ".metadata").unlink(missing_ok=True)
    dist.barrier()
    dcp.save({"model": parameters, "optimizer": state}, checkpoint_id=folder)


def load(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Read this rank's part of `folder`, whatever the number of ranks that wrote it."""
    parameters, state = get_state_dict(model, optimizer)
    dcp.load({"model": parameters, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=parameters, optim_state_dict=state)


def save_and_prove(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> int:
    """Save, erase this rank's shards, load, compare bit for bit; return how many tensors."""
    save(model, optimizer, folder)
    before = {name: tensor.clone() for name, tensor in _shards(model, optimizer)}
    for _, tensor in _shards(model, optimizer):
        tensor.zero_()
    load(model, optimizer, folder)
    after = dict(_shards(model, optimizer))
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    if changed:
        raise RuntimeError(
            f"{folder} did not bring back {len(changed)} of {len(before)} tensors on rank "
            f"{dist.get_rank()}, the first one {changed[0]}"
        )
    return len(before)


@torch.no_grad()
def _shards(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Name this rank's part of every parameter and of its optimizer state."""
    for fqn, parameter in model.named_parameters():
        for name, tensor in {"parameter": parameter, **optimizer.state[parameter]}.items():
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            yield f"{fqn}: {name}", local.detach()
