"""Adoption: an existing module becomes a sharded one, in place.

``adopt`` changes the module's class to a subclass of the original one. The object, its hooks, its
attributes, references to it and ``isinstance`` stay as they were. In the subclass the managed
parameters are properties: inside a forward they read as plain tensors (see ``frame``), elsewhere as
the DTensor parameters that they are.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from rtp_wrap.modules.frame import Frame, read
from rtp_wrap.policy import Gather, Strategy
from rtp_wrap.ring import Ring


@dataclass(frozen=True)
class Adoption:
    """What an adopted module knows: its ring, its fqn and what becomes of its own parameters.

    ``replica_owners`` are the modules at and below this one that have replicated parameters, with
    the parameters' names.
    """

    ring: Ring
    fqn: str
    strategies: dict[str, Strategy]
    replica_owners: list[tuple[nn.Module, str]]

    @property
    def gathers(self) -> bool:
        return any(isinstance(strategy, Gather) for strategy in self.strategies.values())

    def name(self, parameter: str) -> str:
        return f"{self.fqn}.{parameter}" if self.fqn else parameter

    def replicas(self) -> dict[str, DTensor]:
        """The replicated parameters at and below the module, by fqn, tied ones once."""
        found: dict[int, tuple[str, DTensor]] = {}
        for owner, name in self.replica_owners:
            parameter = owner._parameters.get(name)
            assert isinstance(owner, Adopted)
            if isinstance(parameter, DTensor):
                found.setdefault(id(parameter), (owner.adoption.name(name), parameter))
        return dict(found.values())


class Adopted(nn.Module):
    """Mixed in before the original class."""

    _adoption: Adoption

    @property
    def adoption(self) -> Adoption:
        return self._adoption

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with Frame(self._adoption):
            return super().forward(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles name the original class: the adopted one is made, not importable."""
        _, arguments, *state = cast(tuple[Any, ...], super().__reduce_ex__(protocol))
        mixin, original = type(self).__mro__[1:3]
        names = frozenset(self._adoption.strategies)
        return _new_adopted, (mixin, original, names, *arguments[1:]), *state


def adopt(module: nn.Module, adoption: Adoption, mixin: type[Adopted] = Adopted) -> None:
    """Make ``module`` an instance of its class and of ``mixin``, in place."""
    if isinstance(module, torch.jit.ScriptModule):
        raise TypeError(
            f"{adoption.fqn or 'the model'} is a TorchScript module, whose forward cannot see "
            f"sharded parameters: wrap the Python module it was made from, or Ignore() it"
        )
    original = type(module)
    names = frozenset(adoption.strategies)
    module.__class__ = _adopted_class(mixin, original, names)  # type: ignore[arg-type]
    vars(module)["_adoption"] = adoption


@functools.cache
def _adopted_class(mixin: Any, original: Any, names: frozenset[str]) -> type[nn.Module]:
    # Its forward keeps the original's signature, which libraries inspect.
    forward = functools.wraps(original.forward)(_forward_of(mixin))
    members: dict[str, Any] = {"forward": forward, "__module__": original.__module__}
    members.update({name: _parameter(name) for name in names})
    return type(original.__name__, (mixin, original), members)


def _forward_of(mixin: type[Adopted]) -> Any:
    def forward(self: Adopted, *args: Any, **kwargs: Any) -> Any:
        return mixin.forward(self, *args, **kwargs)

    return forward


def _new_adopted(
    mixin: type[Adopted], original: type[nn.Module], names: frozenset[str], *arguments: Any
) -> nn.Module:
    adopted = _adopted_class(mixin, original, names)  # type: ignore[arg-type]
    return adopted.__new__(adopted, *arguments)


def _parameter(name: str) -> property:
    """A managed parameter as an attribute of the class.

    ``nn.Module`` handles assignment and deletion of parameters before a property is asked, so the
    setter only sees what replaces a deleted parameter (old-style weight norm does that).
    """

    def get(self: Adopted) -> Any:
        if name in self._parameters:
            parameter = self._parameters[name]
            if parameter is None:
                return None
            adoption = self._adoption
            return read(parameter, adoption.strategies[name], adoption, adoption.name(name))
        if name in vars(self):
            return vars(self)[name]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def put(self: Adopted, value: Any) -> None:
        vars(self)[name] = value

    def delete(self: Adopted) -> None:
        del vars(self)[name]

    return property(get, put, delete)
