"""What must not happen to an adopted module after wrapping, and what to do instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._functorch import config as partitioning
from torch.distributed.tensor import DTensor

from rtp_wrap.ring import Ring


def check_in_place(parameter: Any, fqn: str) -> DTensor:
    """The managed parameter, if it still is one: a forward is about to use it."""
    if isinstance(parameter, DTensor) and not parameter.data_ptr():  # a DTensor has no memory of
        return parameter  # its own, until `parameter.data = tensor` gives it some that nobody reads
    if isinstance(parameter, DTensor):
        how = "its .data was replaced"
    elif parameter is None:
        how = "it was taken away"
    else:
        how = f"it was replaced by a plain {type(parameter).__name__}"
    raise RuntimeError(
        f"{fqn}: {how} after wrapping, but gradients are averaged, and weights sharded, only for "
        f"the parameters that wrapping made. Write values into those (load_state_dict, or copy_ "
        f"under no_grad), and parametrize, prune or replace weights before wrapping"
    )


def check_new_parameter(fqn: str, ring: Ring) -> None:
    """Raise: a plain parameter is to be registered in a module that was adopted already."""
    raise RuntimeError(
        f"{fqn}: a plain parameter cannot be set after wrapping: the {ring.world_size} ranks' "
        f"gradients for it would not be averaged. Set it before wrapping (a policy rule with "
        f"Ignore() leaves it alone), or write values into the parameter that is there"
    )


def check_new_module(module: nn.Module, fqn: str, ring: Ring) -> None:
    """Raise if a module with trainable parameters of its own is to become part of a wrapped one."""
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and not isinstance(parameter, DTensor):
            raise RuntimeError(
                f"{fqn}: a {type(module).__name__} with the plain parameter {name} cannot become "
                f"part of a wrapped model: the {ring.world_size} ranks' gradients for it would not "
                f"be averaged. Add adapters and replace layers before wrapping"
            )


def check_conversion(convert: Callable[[torch.Tensor], torch.Tensor], fqn: str, ring: Ring) -> None:
    """Raise for what home shards do not survive: ``.to()`` elsewhere, ``share_memory()``."""
    probe = torch.empty(1, device=ring.device)
    converted = convert(probe)
    where = converted.device
    if where != ring.device:
        raise RuntimeError(
            f"{fqn or 'the model'} cannot move to {where}: it was wrapped over a group that moves "
            f"tensors on {ring.device}, and its shards live there. Wrap it over a group of the "
            f"other device's backend; for copies elsewhere, move the tensors of state_dict()"
        )
    if ring.device.type == "cpu" and converted.is_shared():
        raise RuntimeError(
            f"{fqn or 'the model'} is sharded over {ring.world_size} ranks: its parameters have no "
            f"shared memory; share the tensors of a full state_dict() instead"
        )


def check_nothing_recomputed(fqn: str, ring: Ring) -> None:
    """Raise where a compiler may compute parts of a compiled module's forward again for backward.

    It goes by the sizes of this rank's batch then, and other ranks have to exchange tiles with it.
    """
    if ring.world_size == 1:
        return
    if partitioning.activation_memory_budget < 1:
        setting = f"activation_memory_budget = {partitioning.activation_memory_budget}"
    elif partitioning.aggressive_recomputation:
        setting = "aggressive_recomputation = True"
    elif not partitioning.ban_recompute_not_in_allowlist:
        setting = "ban_recompute_not_in_allowlist = False"
    else:
        return
    raise RuntimeError(
        f"{fqn or 'the model'} is compiled under torch._functorch.config.{setting}, with which the "
        f"compiler chooses, by the sizes of each rank's batch, which layers it computes again for "
        f"backward: the {ring.world_size} ranks might choose differently and wait for each other. "
        f"Leave the setting as it was, and use torch.utils.checkpoint around the block or in it"
    )
