"""One running forward of an adopted module: what its parameters read as."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from rtp_wrap.gather import Gathered, RegatherHooks, gather
from rtp_wrap.policy import Replicate, Strategy
from rtp_wrap.replicate import replicated

if TYPE_CHECKING:
    from rtp_wrap.modules.adoption import Adoption

#: A parameter as it reads in one autograd mode: a plain tensor made under ``no_grad`` must not be
#: read where gradients are wanted, nor one of ``inference_mode`` outside it.
_Key = tuple[int, bool, bool]


class Frame:
    """A context manager around the forward of one adopted module.

    Within it, gathered parameters read as whole plain tensors, made once per frame and gone with
    it; replicated ones as plain tensors made once for the outermost frame's whole subtree.
    """

    def __init__(self, adoption: Adoption) -> None:
        self._adoption = adoption
        self._memo: dict[_Key, tuple[DTensor, torch.Tensor]] = {}
        self._hooks: RegatherHooks | None = None

    def __enter__(self) -> None:
        if self._adoption.gathers and torch.is_grad_enabled():
            self._hooks = RegatherHooks()
            self._hooks.__enter__()
        self._adoption.ring.frames.stack.append(self)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._adoption.ring.frames.stack.pop()
        if self._hooks is not None:
            self._hooks.__exit__(kind, error, traceback)
        self._memo.clear()

    def gathered(self, parameter: DTensor, fqn: str) -> torch.Tensor:
        key = _key(parameter)
        if key not in self._memo:
            ring = self._adoption.ring
            whole = gather(parameter, ring, fqn)
            if self._hooks is not None:
                self._hooks.add(Gathered(parameter, whole, ring, fqn))
            self._memo[key] = parameter, whole
        return self._memo[key][1]

    def replicated(self, parameter: DTensor, fqn: str) -> torch.Tensor:
        key = _key(parameter)
        if key not in self._memo:
            below = self._adoption.replicas()
            named = below if any(p is parameter for p in below.values()) else {fqn: parameter}
            plain = replicated(list(named.values()), self._adoption.ring, list(named))
            for each, tensor in zip(named.values(), plain, strict=True):
                self._memo[_key(each)] = each, tensor
        return self._memo[key][1]


def _key(parameter: DTensor) -> _Key:
    return id(parameter), torch.is_grad_enabled(), torch.is_inference_mode_enabled()


def read(parameter: nn.Parameter, strategy: Strategy, adoption: Adoption, fqn: str) -> Any:
    """What ``module.name`` gives: a plain tensor inside a forward, else the parameter itself."""
    ring = adoption.ring
    stack: list[Frame] = ring.frames.stack
    if not isinstance(parameter, DTensor):
        return parameter  # put there by the user after wrapping
    if stack:
        if isinstance(strategy, Replicate):
            return stack[0].replicated(parameter, fqn)
        return stack[-1].gathered(parameter, fqn)
    # A recomputation (activation checkpointing) may begin below any adopted forward. No public call
    # tells that a backward is running in this thread; torch.utils.checkpoint asks the same.
    if torch._C._current_graph_task_id() == -1:
        return parameter
    if isinstance(strategy, Replicate):
        return replicated([parameter], ring, [fqn])[0]
    return gather(parameter, ring, fqn)
