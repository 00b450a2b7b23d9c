"""What must not happen to an adopted module after wrapping, and what to do instead."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._functorch import config as partitioning
from torch.distributed.tensor import DTensor

from rtp_wrap import assigned
from rtp_wrap.engine import is_transformed
from rtp_wrap.policy import Rotate
from rtp_wrap.ring import Ring
from rtp_wrap.transport.room import staging_for, tile_itemsize

#: The ways to give a DTensor values: a whole tensor is no argument of its ``copy_``.
_WRITING = (
    "Write values into those: whole tensors by load_state_dict, or under torch.no_grad() by "
    "parameter.copy_(torch.distributed.tensor.distribute_tensor(value, parameter.device_mesh, "
    "parameter.placements)); this rank's own part into parameter.to_local()"
)


def check_in_place(parameter: Any, fqn: str) -> DTensor:
    """The managed parameter, if it still is one: a forward is about to use it."""
    if isinstance(parameter, DTensor):
        if not assigned.check(parameter):
            assigned.note(parameter, fqn)  # torch.utils.swap_tensors has put it there
        return parameter
    if parameter is None:
        how = "it was taken away"
    else:
        how = f"it was replaced by a plain {type(parameter).__name__}"
    raise RuntimeError(
        f"{fqn}: {how} after wrapping, but gradients are averaged, and weights sharded, only for "
        f"the parameters that wrapping made. {_WRITING}; parametrize, prune or replace weights "
        f"before wrapping"
    )


def check_untransformed(fqn: str, ring: Ring) -> None:
    """Raise if a transform of ``torch.func`` is at work where the weight ``fqn`` rotates."""
    if is_transformed():
        raise RuntimeError(
            f"{fqn}: a transform of torch.func (vmap, grad, jvp, ...) cannot follow a weight "
            f"around {ring.world_size} ranks. Use loss.backward() or torch.autograd.grad(), and a "
            f"loop in the place of vmap; Ignore() in the policy leaves a layer's parameters out"
        )


def check_counts_writes(parameter: DTensor, fqn: str) -> DTensor:
    """The parameter, of which a write would be seen: tiles may have been fetched before it."""
    if parameter._local_tensor.is_inference():
        raise RuntimeError(
            f"{fqn} was made in inference mode, where torch counts no writes, and could be read as "
            f"it was before one: do what put it there (load_state_dict(assign=True), a conversion) "
            f"outside of torch.inference_mode()"
        )
    return parameter


def check_new_parameter(fqn: str, ring: Ring) -> None:
    """Raise: a plain parameter is to be registered in a module that was adopted already."""
    raise RuntimeError(
        f"{fqn}: a plain parameter cannot be set after wrapping: the {ring.rings.size} ranks' "
        f"gradients for it would not be averaged. Set it before wrapping (a policy rule with "
        f"Ignore() leaves it alone), or keep the parameters that are there. {_WRITING}"
    )


def check_new_module(module: nn.Module, fqn: str, ring: Ring) -> None:
    """Raise if a module with trainable parameters of its own is to become part of a wrapped one."""
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and not isinstance(parameter, DTensor):
            raise RuntimeError(
                f"{fqn}: a {type(module).__name__} with the plain parameter {name} cannot become "
                f"part of a wrapped model: the {ring.rings.size} ranks' gradients for it would not "
                f"be averaged. Add adapters and replace layers before wrapping"
            )


def check_conversion(
    convert: Callable[[torch.Tensor], torch.Tensor], module: nn.Module, fqn: str, ring: Ring
) -> None:
    """Raise for what home shards do not survive: ``.to()`` elsewhere, ``share_memory()``.

    Or their tiles: a dtype in which they do not fit the staging. Of everything at and below
    ``module``, as some of it would be converted already when the others are asked.
    """
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
            f"{fqn or 'the model'} belongs to {ring.rings.size} ranks: its parameters have no "
            f"shared memory; share the tensors of a full state_dict() instead"
        )
    for each in module.modules():
        adoption = vars(each).get("_adoption")
        for name, strategy in adoption.strategies.items() if adoption else ():
            weight = each._parameters.get(name)
            if isinstance(strategy, Rotate) and isinstance(weight, DTensor):
                dtype = convert(torch.empty(1, dtype=weight.dtype, device=ring.device)).dtype
                check_room(weight.shape, dtype, adoption.name(name), ring)


def check_room(shape: torch.Size, dtype: torch.dtype, fqn: str, ring: Ring) -> None:
    """Raise if no tile of a rotated weight of ``shape`` would fit the staging in ``dtype``.

    The staging was sized for the dtypes at wrapping, and ranks have it together.
    """
    if ring.world_size == 1:
        return
    tile = math.prod(shape[2:]) * tile_itemsize(dtype, ring.precision, ring.transport_name)
    name, overlap = ring.transport_name, ring.overlap
    needed = staging_for(tile, ring.world_size, name, overlap=overlap)
    if needed > ring.staging_bytes:
        raise RuntimeError(
            f"{fqn} cannot become {dtype}: its smallest tile, one kernel, would have {tile} bytes "
            f"and need a staging of {needed}, but wrapping made one of {ring.staging_bytes}, for "
            f"the dtypes of then. Convert the model before it is wrapped"
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
        f"backward: the {ring.rings.size} ranks might choose differently and wait for each other. "
        f"Leave the setting as it was, and use torch.utils.checkpoint around the block or in it"
    )
