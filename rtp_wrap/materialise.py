"""Models on the meta device: their tensors get values one module at a time.

A module is initialised by its own ``reset_parameters``, or by the user's ``param_init_fn``, on the
device of the ring. Only its own parameters and buffers have memory then; the caller settles them
before the next module's turn, so that no device ever has the whole weights of two modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from rtp_wrap.assign import Assignment
from rtp_wrap.modules.recurrent import is_recurrent
from rtp_wrap.names import own_names
from rtp_wrap.policy import Ignore
from rtp_wrap.ring import Ring

ParamInitFn = Callable[[nn.Module], object]

#: What new tensors hold until they are initialised, where the dtype has a value that can be told
#: from others: it stops a training that reads it, which left-over memory may not.
_UNSET: dict[torch.dtype, float | int] = {
    **dict.fromkeys((torch.float16, torch.bfloat16, torch.float32, torch.float64), float("nan")),
    **{dtype: torch.iinfo(dtype).min for dtype in (torch.int32, torch.int64)},
}
#: What helps where one rank failed in the middle of wrapping.
BUILD_ANEW = "Parts of the model may be sharded already: build it anew before you wrap it again"
#: Modules that an error names.
_NAMED = 5


def check_initialisable(
    model: nn.Module, assignments: list[Assignment], param_init_fn: ParamInitFn | None
) -> None:
    """Raise ``ValueError`` for what is on the meta device and will get no values."""
    for each in assignments:
        if isinstance(each.home, Ignore) and each.parameter.is_meta:
            raise ValueError(
                f"{each.fqn} is on the meta device and the policy ignores it: give it values "
                f"before wrapping, or let no Ignore() rule name it"
            )
    unable = [
        f"{_name(fqn, module)} ({type(module).__name__})"
        for fqn, module in _on_meta(model)
        if isinstance(module, torch.jit.ScriptModule)
        or (param_init_fn is None and not callable(getattr(module, "reset_parameters", None)))
    ]
    if unable:
        more = f" and {len(unable) - _NAMED} more" if len(unable) > _NAMED else ""
        raise ValueError(
            f"nothing can initialise the own parameters or buffers of {', '.join(unable[:_NAMED])}"
            f"{more}, which are on the meta device: these modules have no reset_parameters(). Give "
            f"RotatedTensorParallel a param_init_fn=, which is called with each module that has "
            f"any on the meta device, or give them values before wrapping"
        )


def _on_meta(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that have own tensors on the meta device which no module before them has."""
    seen: set[int] = set()
    for fqn, module in own_names(model):
        new = {id(tensor) for tensor in _own(module).values() if tensor.is_meta} - seen
        seen |= new
        if new:
            yield fqn, module


def materialise(
    fqn: str, module: nn.Module, ring: Ring, param_init_fn: ParamInitFn | None
) -> dict[str, torch.Tensor]:
    """Values for the own tensors of ``module`` that are on the meta device, by name.

    They are on the ring's device; the module's tensors are the same afterwards. Parameters that are
    tied to an earlier module's have been settled with it, and keep those values. Raises
    ``ValueError`` for what has no value of its shape and dtype after the initialisation. An
    exception of one rank is an error on all.
    """
    before = _own(module)
    wanted = {name: tensor for name, tensor in before.items() if tensor.is_meta}
    if not wanted:
        return {}
    site = _name(fqn, module)
    together = ring.lockstep.together(f"initialisation of {site}", BUILD_ANEW)
    with together, _alone(module, ring.device):
        _initialise(site, module, param_init_fn, ring.device)
        after = _own(module)
        if new := [name for name in after if name not in before]:
            raise ValueError(
                f"{site}: its initialisation registered {new[0]}, which it did not have when the "
                f"model was wrapped: initialise the tensors it has, or build it with {new[0]}"
            )
        for name, tensor in wanted.items():
            own_fqn = f"{fqn}.{name}" if fqn else name
            _check(own_fqn, tensor, after.get(name), complete=param_init_fn is None)
    if is_recurrent(module):  # its list of weights may have new ones, and would keep them alive
        names = vars(module)["_flat_weights_names"]
        vars(module)["_flat_weights"] = [before.get(each) for each in names]
    return {name: after[name].detach() for name in wanted}


def _initialise(
    site: str, module: nn.Module, param_init_fn: ParamInitFn | None, device: torch.device
) -> None:
    # On every rank, though rank 0's values are the ones that count: so the random states of all
    # ranks advance alike, as they do when every rank builds the model on the CPU.
    initialise: Any = module.reset_parameters if param_init_fn is None else param_init_fn
    arguments = () if param_init_fn is None else (module,)
    # A model is often wrapped where it was built: under `torch.device("meta")`.
    left_meta: AbstractContextManager[Any] = (
        device if torch.get_default_device().type == "meta" else nullcontext()
    )
    try:
        with torch.no_grad(), left_meta:
            initialise(*arguments)
    except Exception as error:
        raise RuntimeError(
            f"{site}: its initialisation raised {type(error).__name__}: {error}. It must not need "
            f"values of other modules, which are on the meta device meanwhile"
        ) from error


@contextmanager
def _alone(module: nn.Module, device: torch.device) -> Iterator[None]:
    """A block in which the module has tensors to be written to, and modules below it have none.

    What the module has on the meta device gets memory, what has values already a stand-in: neither
    its initialisation nor that of modules around it may change them. All are back after the block.
    """
    kept: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (registry, dict(registry))
        for each in module.modules()
        if not isinstance(each, torch.jit.ScriptModule)
        for registry in (each._parameters, each._buffers)
    ]
    stand_ins: dict[int, torch.Tensor] = {}  # one for all names of a tensor
    try:
        for registry, tensors in kept:
            own = registry is module._parameters or registry is module._buffers
            for name, tensor in tensors.items():
                if tensor is not None and (own or not tensor.is_meta):
                    if id(tensor) not in stand_ins:
                        where = device if own else torch.device("meta")
                        stand_ins[id(tensor)] = _stand_in(tensor, where)
                    registry[name] = stand_ins[id(tensor)]
        del stand_ins
        yield
    finally:
        for registry, tensors in kept:
            registry.clear()
            registry.update(tensors)


def _stand_in(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Another tensor (parameter) like it, with its values if it is a plain tensor that has any."""
    if tensor.is_meta or device.type == "meta" or isinstance(tensor, DTensor):
        other = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        if tensor.dtype in _UNSET:
            other.fill_(_UNSET[tensor.dtype])
    else:
        other = tensor.detach().to(device, copy=True)
    if isinstance(tensor, nn.Parameter):
        other = nn.Parameter(other, requires_grad=tensor.requires_grad)
    vars(other).update(vars(tensor))
    return other


def _check(fqn: str, tensor: torch.Tensor, value: torch.Tensor | None, complete: bool) -> None:
    if value is None:
        problem = "is gone"
    elif value.is_meta:
        problem = "is still on the meta device"
    elif value.shape != tensor.shape or value.dtype != tensor.dtype:
        problem = f"is {_like(value)} instead of {_like(tensor)}"
    elif complete and _has_unset(value):
        raise ValueError(
            f"{fqn} was left without values by reset_parameters(): give RotatedTensorParallel a "
            f"param_init_fn= that sets it, or give it values before wrapping"
        )
    else:
        return
    raise ValueError(
        f"{fqn} {problem} after its module was initialised: reset_parameters() or param_init_fn "
        f"must write to the tensor that is there, or put one of its shape and dtype in its place"
    )


def _has_unset(value: torch.Tensor) -> bool:
    if value.dtype not in _UNSET or value.numel() == 0:
        return False
    if value.dtype.is_floating_point:
        return bool(value.amax().isnan())  # a maximum is NaN if any element is
    return bool(value.amin() == _UNSET[value.dtype])


def _own(module: nn.Module) -> dict[str, torch.Tensor]:
    """The module's own parameters and buffers, by name."""
    registered = {**module._parameters, **module._buffers}
    return {name: tensor for name, tensor in registered.items() if tensor is not None}


def _name(fqn: str, module: nn.Module) -> str:
    return fqn or f"the root {type(module).__name__}"


def _like(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}"
