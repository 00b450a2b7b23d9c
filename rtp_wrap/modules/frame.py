"""One running forward of an adopted module: what its parameters read as."""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor

from rtp_wrap.engine import PackHooks, hooks_are_disabled, hooks_in_force, running_backward
from rtp_wrap.gather import Gathered, RegatherHooks, gather
from rtp_wrap.modules.adoption import Adoption
from rtp_wrap.modules.misuse import check_in_place
from rtp_wrap.policy import Replicate, Strategy
from rtp_wrap.replicate import replicated
from rtp_wrap.versions import Stamp, versions_of

#: A parameter as it reads in one autograd mode: a plain tensor made under ``no_grad`` must not be
#: read where gradients are wanted, nor one of ``inference_mode`` outside it.
_Key = tuple[int, bool, bool]


class _Read(NamedTuple):
    """What a parameter read as, and its versions then. It is kept, as its id is a key."""

    parameter: DTensor
    plain: torch.Tensor
    versions: tuple[int, int]

    @classmethod
    def now(cls, parameter: DTensor, plain: torch.Tensor) -> _Read:
        return cls(parameter, plain, versions_of(parameter))

    def is_current(self) -> bool:
        """Whether it was not written since, by the forward of a module around this one say."""
        return versions_of(self.parameter) == self.versions


class _Cast(NamedTuple):
    """A replicated parameter's copy in another dtype."""

    fqn: str
    plain: torch.Tensor
    stamp: Stamp

    def check_unwritten(self) -> None:
        """Raise if the module wrote to it: the write could not reach the parameter."""
        if self.stamp.was_written(self.plain):
            raise RuntimeError(
                f"{self.fqn} was written to by its module's forward, where it is a copy in "
                f"{self.plain.dtype}: write to the parameter itself, as parameters() has it, make "
                f"it a buffer, or Ignore() it in the policy"
            )


#: Where replicated parameters are, by the module that was called: whose they are, and their names.
_places: weakref.WeakKeyDictionary[nn.Module, list[tuple[weakref.ref[nn.Module], str]]]
_places = weakref.WeakKeyDictionary()
_NOTHING = nullcontext()


class Frame:
    """A context manager around the forward of one adopted module.

    Within it, gathered parameters read as whole plain tensors, made once per frame and gone with
    it; replicated ones as plain tensors made once for the outermost frame's whole subtree. One that
    was written since (a momentum encoder, say) is made anew.
    ``regather=False`` leaves what autograd saves of gathered weights to the hooks around.
    """

    __slots__ = (
        "_adoption",
        "_around",
        "_casts",
        "_gathered",
        "_hooks",
        "_memo",
        "_module",
        "_outermost",
        "_regather",
    )

    def __init__(self, module: nn.Module, adoption: Adoption, regather: bool = True) -> None:
        self._module, self._adoption, self._regather = module, adoption, regather
        self._outermost = False
        self._memo: dict[_Key, _Read] = {}
        self._gathered: list[Gathered] = []
        self._casts: list[_Cast] = []
        self._around: PackHooks | None = None
        self._hooks: saved_tensors_hooks | None = None

    def __enter__(self) -> None:
        stack: list[Frame] = self._adoption.ring.frames.stack
        self._around = hooks_in_force()
        ring = self._adoption.ring
        if not stack and running_backward() == -1:
            ring.begin_forward(self._adoption.fqn)
            self._outermost = True
        ring.note_grad_mode()
        if ring.sites is not None and self._adoption.strategies:
            ring.sites.append(self._adoption.fqn)
        stack.append(self)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        ring = self._adoption.ring
        ring.frames.stack.pop()
        if self._hooks is not None:
            self._hooks.__exit__()
        if self._outermost:
            ring.end_forward(raised=kind is not None)
        if self._memo:
            copies: list[Gathered | _Cast] = [*self._gathered, *self._casts]
            # What autograd saved refers to the list, which must not keep whole weights alive.
            self._gathered.clear()
            self._casts.clear()
            self._memo.clear()
            if kind is None:
                for each in copies:
                    each.check_unwritten()
        if kind is None and self._outermost:
            ring.check_in_step()

    def gathered(self, parameter: DTensor, fqn: str, dtype: torch.dtype) -> torch.Tensor:
        known = self._memo.get(_key(parameter))
        if known is not None and known.is_current():
            return known.plain
        ring = self._adoption.ring
        whole = gather(parameter, ring, fqn, dtype)
        gathered = Gathered(parameter, whole, ring, fqn)
        self._gathered.append(gathered)
        self._memo[_key(parameter)] = _Read.now(parameter, whole)
        if gathered.is_copy:
            self._install_hooks()
        return whole

    def replicated(self, parameter: DTensor, fqn: str, dtype: torch.dtype) -> torch.Tensor:
        key = _key(parameter)
        known = self._memo.get(key)
        if known is None or not known.is_current():
            below = _replicas(self._module)
            if known is not None or all(each is not parameter for each, _ in below.values()):
                below = {fqn: (parameter, dtype)}
            parameters, dtypes = zip(*below.values(), strict=True)
            plain = replicated(parameters, self._adoption.ring, list(below), dtypes)
            for name, each, tensor in zip(below, parameters, plain, strict=True):
                self._memo[_key(each)] = _Read.now(each, tensor)
                if tensor.dtype != each.dtype:
                    self._casts.append(_Cast(name, tensor, Stamp.of(tensor)))
        return self._memo[key].plain

    def _install_hooks(self) -> None:
        """From the first gathered weight on, hooks see what autograd saves in this frame.

        Not inside somebody else's hooks that were entered in this forward: they will be left before
        ours, and a stack has one order.
        """
        if self._hooks is not None or not self._regather or not torch.is_grad_enabled():
            return
        if not hooks_are_disabled() and hooks_in_force() == self._around:
            hooks = RegatherHooks(self._adoption.ring, self._gathered, self._around)
            self._hooks = saved_tensors_hooks(hooks.pack, hooks.unpack)
            self._hooks.__enter__()


def frame_of(
    module: nn.Module, adoption: Adoption, regather: bool = True
) -> AbstractContextManager[None]:
    """The frame of a forward of ``module``; nothing where it is the one that runs already.

    ``__call__`` has one for the hooks, and so has ``forward``, which may be called itself.
    """
    stack: list[Frame] = adoption.ring.frames.stack
    if stack and stack[-1]._module is module:
        return _NOTHING
    return Frame(module, adoption, regather)


def _replicas(module: nn.Module) -> dict[str, tuple[DTensor, torch.dtype]]:
    """The replicated parameters at and below ``module`` by fqn, tied ones once; their dtypes.

    Where they are is looked up once. One that came later has an average of its own.
    """
    places = _places.get(module)
    if places is None:
        _places[module] = places = [
            (weakref.ref(each), name)
            for each in module.modules()
            if (adoption := vars(each).get("_adoption")) is not None
            for name, strategy in adoption.strategies.items()
            if isinstance(strategy, Replicate)
        ]
    found: dict[int, tuple[str, tuple[DTensor, torch.dtype]]] = {}
    for place, name in places:
        owner = place()
        parameter = None if owner is None else owner._parameters.get(name)
        if owner is not None and isinstance(parameter, DTensor):
            adoption = vars(owner)["_adoption"]
            dtype = adoption.precision.compute_dtype(parameter.dtype)
            found.setdefault(id(parameter), (adoption.name(name), (parameter, dtype)))
    return dict(found.values())


def _key(parameter: DTensor) -> _Key:
    return id(parameter), torch.is_grad_enabled(), torch.is_inference_mode_enabled()


def read(parameter: nn.Parameter, strategy: Strategy, adoption: Adoption, fqn: str) -> Any:
    """What ``module.name`` gives: a plain tensor inside a forward, else the parameter itself."""
    ring = adoption.ring
    stack: list[Frame] = ring.frames.stack
    # A recomputation (activation checkpointing) may begin below any adopted forward.
    if not stack and running_backward() == -1:
        return parameter
    ours = check_in_place(parameter, fqn)
    dtype = adoption.precision.compute_dtype(ours.dtype)
    if isinstance(strategy, Replicate):
        if stack:
            return stack[0].replicated(ours, fqn, dtype)
        return replicated([ours], ring, [fqn], [dtype])[0]
    return stack[-1].gathered(ours, fqn, dtype) if stack else gather(ours, ring, fqn, dtype)
