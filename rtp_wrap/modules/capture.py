"""What modules read in a compiled graph, prepared outside of it."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Any

import torch
from torch import nn

from rtp_wrap.modules.adoption import Adoption
from rtp_wrap.modules.misuse import check_nothing_recomputed
from rtp_wrap.ops.captured import Order


class Capture:
    """A context manager around one call of a compiled module, within its frame.

    Frames, gathers and the nodes of weights are nothing that a compiler can follow. So all of them
    are made here, for the module and those below it, and the graph finds plain tensors in
    ``_captured`` of each module. Modules that no graph can contain, and those below them, are left
    out: there the graph is interrupted, and they run as if nothing was compiled.
    """

    __slots__ = ("_adoption", "_before", "_module")

    def __init__(self, module: nn.Module, adoption: Adoption) -> None:
        self._module, self._adoption = module, adoption
        self._before: list[tuple[nn.Module, Any]] = []

    def __enter__(self) -> None:
        check_nothing_recomputed(self._adoption.fqn, self._adoption.ring)
        try:
            # As parameters are, also under no_grad: the module may enable gradients for itself.
            # In inference mode nothing does, and a graph could not save what is made there.
            with torch.set_grad_enabled(not torch.is_inference_mode_enabled()):
                self._capture()
        except BaseException:
            self._restore()
            raise

    def _capture(self) -> None:
        order = Order()
        for module, adoption in _compilable(self._module):
            sites = adoption.ring.sites
            if sites is not None and adoption.strategies and module is not self._module:
                sites.append(adoption.fqn)  # no frame will tell when it is called
            self._before.append((module, vars(module).get("_captured")))
            vars(module)["_captured"] = module._capture(adoption, order)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        """What was captured must not outlive the call: graphs and gathered weights hang on it."""
        for module, before in self._before:
            if before is None:
                vars(module).pop("_captured", None)
            else:
                vars(module)["_captured"] = before
        self._before.clear()


def _compilable(module: nn.Module) -> Iterator[tuple[Any, Adoption]]:
    """The adopted modules that a graph of ``module`` can contain, and their adoptions."""
    pending, seen = [module], {module}
    while pending:
        module = pending.pop()
        adoption = vars(module).get("_adoption")
        if adoption is not None:
            if not module._compiles:
                continue
            yield module, adoption
        below = [each for each in module.children() if each not in seen]
        seen.update(below)
        pending += reversed(below)
