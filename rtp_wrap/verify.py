"""What must hold before anything of a model is changed, on every rank."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from rtp_wrap.assign import Assignment
from rtp_wrap.modules import Adopted, refuse_max_norm
from rtp_wrap.policy import Ignore
from rtp_wrap.ring import Ring, was_retired

#: What helps where ranks differ before anything was changed.
SAME_MODEL = "Wrap the same model with the same policy on every rank"


def check_module(module: nn.Module) -> None:
    """Raise ``TypeError`` or ``ValueError`` for what is no module, or is wrapped or sharded."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"RotatedTensorParallel wraps an nn.Module, not {type(module).__name__}")
    for fqn, inner in module.named_modules():
        if isinstance(inner, Adopted) or "_ring" in vars(inner):
            raise ValueError(
                f"{fqn or 'the model'} is wrapped already: wrap the outermost module, once"
            )
        if isinstance(inner, DistributedDataParallel):
            raise ValueError(
                f"{fqn or 'the model'} is a DistributedDataParallel, which averages gradients that "
                f"are averaged here: wrap the module inside of it"
            )
    for fqn, parameter in module.named_parameters():
        if isinstance(parameter, DTensor):
            raise ValueError(
                f"{fqn} is a DTensor: wrap the model before other parallelism shards it"
            )
        if was_retired(parameter):
            raise ValueError(
                f"{fqn} is tied to a model that was wrapped before: put both models into one "
                f"module and wrap that"
            )


def check_init_fn(param_init_fn: object) -> None:
    """Raise ``TypeError`` for what cannot be called."""
    if param_init_fn is not None and not callable(param_init_fn):
        raise TypeError(
            f"param_init_fn={param_init_fn!r} cannot be called: give a function of one module"
        )


def check_uses(assignments: list[Assignment], world_size: int) -> None:
    """Raise ``TypeError`` or ``ValueError`` for modules that cannot use managed parameters."""
    for each in assignments:
        for use in each.uses:
            if use.strategy == Ignore():
                continue
            if isinstance(use.module, torch.jit.ScriptModule):
                raise TypeError(
                    f"{use.fqn} belongs to a TorchScript module, whose forward cannot see sharded "
                    f"parameters: wrap the Python module it was made from, or Ignore() it"
                )
            if world_size > 1 and use.name == "weight":
                refuse_max_norm(use.module, use.fqn)


def check_parameters(module: nn.Module, assignments: list[Assignment]) -> None:
    """Raise ``ValueError`` for what would stay behind with the parameters that wrapping replaces.

    That is hooks, gradients, and references that are no registered names of the parameters. And for
    sparse buffers, which cannot be rank 0's everywhere.
    """
    for fqn, buffer in module.named_buffers():
        if buffer.layout != torch.strided:
            raise ValueError(
                f"{fqn} is a buffer of layout {buffer.layout}, which the ranks cannot have from "
                f"rank 0: register its indices and values, or make it a plain attribute"
            )
    managed = {each.parameter: each.fqn for each in assignments if each.home != Ignore()}
    for parameter, fqn in managed.items():
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            raise ValueError(
                f"{fqn} has hooks, which wrapping would lose: call register_hook and "
                f"register_post_accumulate_grad_hook after wrapping, on the wrapped model's "
                f"parameters, whose gradients are DTensors of 1/N"
            )
        if parameter.grad is not None:
            raise ValueError(
                f"{fqn} has a gradient, which wrapping would lose: take the optimizer step, and "
                f"call zero_grad(), before wrapping"
            )
    registered, seen = set(module.modules()), set[int]()
    for fqn, inner in module.named_modules():
        for name, value in vars(inner).items():
            # An adopted recurrent layer reads its list through the parameters.
            if name == "_parameters" or (isinstance(inner, nn.RNNBase) and name == "_flat_weights"):
                continue
            where = f"{fqn}.{name}" if fqn else name
            for path, tensor in _held(value, where, registered, seen, _DEPTH):
                if isinstance(tensor, nn.Parameter) and tensor in managed:
                    raise ValueError(
                        f"{path} is the parameter {managed[tensor]} once more, in a place where "
                        f"wrapping does not replace it: what is read there would never train. Read "
                        f"the parameter's own name in the forward, or keep it in an "
                        f"nn.ParameterList or nn.ParameterDict (modules: in an nn.ModuleList)"
                    )


#: How deep in lists, tuples, dicts and sets parameters are looked for.
_DEPTH = 4


def _held(
    value: object, path: str, registered: set[nn.Module], seen: set[int], depth: int
) -> Iterator[tuple[str, object]]:
    """What is in an attribute, in containers in it, and in modules that are not ``registered``."""
    if isinstance(value, nn.Module):
        for fqn, inner in () if value in registered else value.named_modules():
            if inner not in registered:  # it may have the model in it, too
                for name, parameter in inner._parameters.items():
                    yield ".".join(filter(None, (path, fqn, name))), parameter
    elif isinstance(value, dict | list | tuple | set | frozenset):
        if depth == 0 or id(value) in seen:
            return
        seen.add(id(value))
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _held(each, f"{path}[{key!r}]", registered, seen, depth - 1)
    else:
        yield path, value


def device_of(mesh: DeviceMesh, assignments: list[Assignment]) -> torch.device:
    """Where home shards live: this rank's device of the mesh's type."""
    kind = mesh.device_type
    device = (
        torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)
    )
    for each in assignments:
        if each.parameter.device.type not in ("cpu", "meta", kind):
            raise ValueError(
                f"{each.fqn} is on {each.parameter.device}, but the group's backend moves {kind} "
                f"tensors: initialise it with the backend for that device (NCCL for CUDA)"
            )
    return device


def check_same_everywhere(
    module: nn.Module,
    assignments: list[Assignment],
    ring: Ring,
    staging: str,
    param_init_fn: object,
) -> None:
    """Ranks with another model or policy would hang or mix up weights; they get an error here.

    ``staging`` is what this rank wants for tiles in flight.
    """
    for each in assignments:
        parameter = each.parameter
        uses = [f"{use.fqn} {use.strategy} {type(use.module).__name__}" for use in each.uses]
        ring.lockstep.record(
            f"parameter {each.fqn} {tuple(parameter.shape)} {parameter.dtype} {each.home} {uses} "
            f"requires_grad={parameter.requires_grad} meta={parameter.is_meta}"
        )
    for fqn, buffer in module.named_buffers():
        ring.lockstep.record(
            f"buffer {fqn} {tuple(buffer.shape)} {buffer.dtype} meta={buffer.is_meta}"
        )
    ring.lockstep.record(f"{staging}, overlap={ring.overlap}")
    ring.lockstep.record(f"{ring.precision}")
    ring.lockstep.record(f"{'a' if param_init_fn is not None else 'no'} param_init_fn")
    ring.lockstep.verify("wrapping", SAME_MODEL)
