"""Adoption: an existing module becomes a sharded one, in place.

``adopt`` changes the module's class to a subclass of the original one. The object, its hooks, its
attributes, references to it and ``isinstance`` stay as they were. In the subclass the managed
parameters are properties: inside a forward they read as plain tensors (see ``frame``), elsewhere as
the DTensor parameters that they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from rtp_wrap import assigned
from rtp_wrap.casting import cast_floats, cast_inputs
from rtp_wrap.modules.adoption import Adoption
from rtp_wrap.modules.capture import Capture
from rtp_wrap.modules.frame import frame_of, read
from rtp_wrap.modules.loading import own_part
from rtp_wrap.modules.misuse import (
    check_conversion,
    check_new_module,
    check_new_parameter,
    check_room,
)
from rtp_wrap.ops.captured import Order
from rtp_wrap.policy import Rotate


def _in_a_frame(method: Callable[..., Any]) -> Callable[..., Any]:
    """``method`` of an adopted module with its parameters as plain tensors."""

    def run(self: Adopted, *args: Any, **kwargs: Any) -> Any:
        if self._adoption is None:
            return method(self, *args, **kwargs)
        if self._captured is not None and torch.compiler.is_compiling():
            return method(self, *args, **kwargs)
        with frame_of(self, self._adoption):
            return method(self, *args, **kwargs)

    return run


class Adopted(nn.Module):
    """Mixed in before the original class."""

    #: None for what the class makes of itself later: a slice of an ``nn.Sequential``, for one.
    _adoption: Adoption | None = None
    #: Names of methods that run as a forward does.
    _forward_methods: frozenset[str] = frozenset()

    #: In a call of a compiled module: what it reads in the graph (see ``capture``).
    _captured: dict[str, Any] | None = None
    #: Whether a graph can contain it.
    _compiles = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._adoption is None:
            return super().__call__(*args, **kwargs)
        if torch.compiler.is_compiling():
            if self._captured is None:
                return _call_uncompiled(self, args, kwargs)
            return super().__call__(*args, **kwargs)
        if self._compiled_call_impl is not None:
            with _compiled_frame(self, self._adoption), Capture(self, self._adoption):
                return super().__call__(*args, **kwargs)
        # Around hooks, too, and around a ``forward`` that was patched into the object.
        with frame_of(self, self._adoption):
            return super().__call__(*args, **kwargs)

    @_in_a_frame
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)

    def _capture(self, adoption: Adoption, order: Order) -> dict[str, Any]:
        """What a graph reads of this module; called in its frame, or in that of one above."""
        return {
            name: getattr(self, name)
            for name, strategy in adoption.strategies.items()
            if not isinstance(strategy, Rotate) or adoption.ring.world_size == 1
        }

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        adoption, present = self._adoption, self._parameters.get(name)
        ignored = present is not None and not isinstance(present, DTensor)
        if adoption and param is not None and not isinstance(param, DTensor) and not ignored:
            check_new_parameter(adoption.name(name), adoption.ring)
        super().register_parameter(name, param)
        self._note_parameters()

    def add_module(self, name: str, module: nn.Module | None) -> None:
        if module is not None and self._adoption is not None:
            _take_in(module, self._adoption, name)
        super().add_module(name, module)

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Module) and self._adoption is not None:
            _take_in(value, self._adoption, name)
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        if self._adoption is None:
            return super()._apply(fn, recurse)
        check_conversion(fn, self, self._adoption.fqn, self._adoption.ring)
        result = super()._apply(lambda tensor: _contiguous(fn(tensor)), recurse)
        self._note_parameters()
        return result

    def _note_parameters(self) -> None:
        """Its own parameters are new ones: from now on they are written in place only."""
        for name, parameter in self._parameters.items():
            if self._adoption is not None and isinstance(parameter, DTensor):
                assigned.note(parameter, self._adoption.name(name))

    def _save_to_state_dict(self, *arguments: Any) -> None:
        for parameter in self._parameters.values():
            if self._adoption is not None and isinstance(parameter, DTensor):
                assigned.check(parameter)
        super()._save_to_state_dict(*arguments)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, *arguments: Any
    ) -> None:
        """Of whole tensors (a dense model's checkpoint) every rank loads its own part."""
        adoption, assigns = self._adoption, local_metadata.get("assign_to_params_buffers", False)
        for name, strategy in adoption.strategies.items() if adoption else ():
            parameter, value = self._parameters.get(name), state_dict.get(prefix + name)
            if not (
                adoption
                and isinstance(parameter, DTensor)
                and isinstance(value, torch.Tensor)
                and value.shape == parameter.shape
            ):
                continue  # torch has an error for other shapes
            if assigns and isinstance(strategy, Rotate):  # else it is cast
                check_room(parameter.shape, value.dtype, adoption.name(name), adoption.ring)
            if not isinstance(value, DTensor):
                state_dict[prefix + name] = own_part(value, parameter, adoption.ring)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *arguments)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._note_parameters()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles name the original class: the adopted one is made, not importable."""
        _, arguments, *state = cast(tuple[Any, ...], super().__reduce_ex__(protocol))
        mixin, original = type(self).__bases__
        names = frozenset(self._adoption.strategies) if self._adoption else frozenset()
        made_from = mixin, original, names, self._forward_methods
        return _new_adopted, (*made_from, *arguments[1:]), *state


class AdoptedParameterList(Adopted):
    """An ``nn.ParameterList``, whose slices would make new parameters of what was gathered."""

    __iter__: Callable[[], Iterator[Any]]

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice) and self._adoption and self._adoption.ring.frames.stack:
            return list(self)[index]
        return super().__getitem__(index)  # type: ignore[misc]


class AdoptedOptimizedModule(Adopted):
    """What ``torch.compile(module)`` returned: the graph is entered in its ``forward``."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._adoption is None or torch.compiler.is_compiling():
            return super().__call__(*args, **kwargs)
        with _compiled_frame(self, self._adoption), Capture(self, self._adoption):
            return super().__call__(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """The class makes its copies of the module inside, not of a state."""
        original = type(self).__bases__[1]
        return _new_optimized, (original, self._orig_mod, self.dynamo_ctx, self._adoption)


def _new_optimized(
    original: Any, module: nn.Module, context: Any, adoption: Adoption | None
) -> nn.Module:
    new: nn.Module = original(module, context)
    if adoption is not None:
        adopt(new, adoption, AdoptedOptimizedModule)
    return new


def _compiled_frame(module: nn.Module, adoption: Adoption) -> AbstractContextManager[None]:
    """Of a module that is entered by a graph, which keeps what is gathered for it.

    Whether a graph needs a weight again depends on the sizes of a rank's batch: it must not depend
    on that whether the rank gathers it again.
    """
    return frame_of(module, adoption, regather=False)


def is_optimized(module: nn.Module) -> bool:
    """Whether ``module`` is what ``torch.compile`` returned for another one."""
    return "_orig_mod" in module._modules


def _contiguous(converted: torch.Tensor) -> torch.Tensor:
    """Home shards have no other memory format, nor have gradients: tiles are copies anyway."""
    if isinstance(converted, DTensor) and not converted._local_tensor.is_contiguous():
        return converted.contiguous()
    return converted


def _take_in(module: nn.Module, parent: Adoption, name: str) -> None:
    """``module`` becomes a part of the parent: nothing new, but maybe something compiled."""
    check_new_module(module, parent.name(name), parent.ring)
    if is_optimized(module) and "_adoption" not in vars(module):
        adoption = replace(parent, fqn=parent.name(name), strategies={})
        adopt(module, adoption, AdoptedOptimizedModule)


def adopt(module: nn.Module, adoption: Adoption, mixin: type[Adopted] = Adopted) -> None:
    """Make ``module`` an instance of its class and of ``mixin``, in place."""
    original = type(module)
    names = frozenset(adoption.strategies)
    # What torch.compile returned hands attributes that are set on to the module inside.
    object.__setattr__(module, "__class__", _adopted_class(mixin, original, names, frozenset()))  # type: ignore[arg-type]
    for name, member in vars(mixin).items():
        if isinstance(member, property):
            vars(module).pop(name, None)  # what the property replaces would stay alive, unread
    vars(module)["_adoption"] = adoption
    cast(Adopted, module)._note_parameters()


def add_forward_method(module: Adopted, name: str) -> None:
    """Make method ``name`` of an adopted module one that runs as a forward does.

    By another class, not by an attribute bound to this object, which copies would share.
    """
    mixin, original = type(module).__bases__
    assert module._adoption is not None
    names = frozenset(module._adoption.strategies)
    adopted = _adopted_class(mixin, original, names, module._forward_methods | {name})
    object.__setattr__(module, "__class__", adopted)


@functools.cache
def _adopted_class(
    mixin: Any, original: Any, names: frozenset[str], methods: frozenset[str]
) -> type[nn.Module]:
    members: dict[str, Any] = {
        name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")
    }
    # Both keep the original's signature, which libraries inspect.
    members["forward"] = functools.wraps(original.forward)(_with_casts(mixin.forward))
    members["_forward_methods"] = methods
    members.update({name: _parameter(name) for name in names})
    adopted = type(original.__name__, (mixin, original), members)
    for name in methods:
        method = getattr(adopted, name)
        setattr(adopted, name, functools.wraps(method)(_with_casts(_in_a_frame(method))))
    return adopted


def _with_casts(method: Callable[..., Any]) -> Callable[..., Any]:
    """``method`` with inputs and outputs in the dtypes of the precision policy."""

    def run(self: Adopted, *args: Any, **kwargs: Any) -> Any:
        adoption = self._adoption
        if adoption is None:
            return method(self, *args, **kwargs)
        precision = adoption.ring.precision
        args, kwargs = cast_inputs((args, kwargs), precision)
        output = method(self, *args, **kwargs)
        if precision.output_dtype is not None and adoption.at_root:
            output = cast_floats(output, precision.output_dtype)
        return output

    return run


@torch.compiler.disable(reason="only blocks of a wrapped model can be compiled: block.compile()")
def _call_uncompiled(module: Adopted, args: Any, kwargs: Any) -> Any:
    if torch.compiler.is_exporting():  # which runs no compiler that this could be left out of
        fqn = module._adoption.fqn if module._adoption else ""
        raise RuntimeError(
            f"{fqn or 'the model'} is wrapped, and its shards cannot be exported: export a dense "
            f"model, into which a full state_dict() of the wrapped one was loaded"
        )
    return module(*args, **kwargs)


def _new_adopted(
    mixin: type[Adopted],
    original: type[nn.Module],
    names: frozenset[str],
    methods: frozenset[str],
    *arguments: Any,
) -> nn.Module:
    adopted = _adopted_class(mixin, original, names, methods)  # type: ignore[arg-type]
    return adopted.__new__(adopted, *arguments)


def _parameter(name: str) -> property:
    """A managed parameter as an attribute of the class.

    ``nn.Module`` handles assignment and deletion of parameters before a property is asked, so the
    setter only sees what replaces a deleted parameter (old-style weight norm does that).
    """

    def get(self: Adopted) -> Any:
        captured = self._captured
        if captured is not None and name in captured and torch.compiler.is_compiling():
            return captured[name]
        if name in self._parameters:
            parameter = self._parameters[name]
            if parameter is None:
                return None
            adoption = self._adoption
            if adoption is None:
                return parameter
            return read(parameter, adoption.strategies[name], adoption, adoption.name(name))
        if name in vars(self):
            return vars(self)[name]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def put(self: Adopted, value: Any) -> None:
        vars(self)[name] = value

    def delete(self: Adopted) -> None:
        del vars(self)[name]

    return property(get, put, delete)
