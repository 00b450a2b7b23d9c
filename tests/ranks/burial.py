"""Gloo groups of wrapped models end beside the next task, not where the last one lets go of them.

That takes 20 ms, in which a rank does nothing: half of the time of a small test.
"""

from __future__ import annotations

import threading
from typing import Any
from unittest import mock

import torch.distributed as dist

_Gloo = dist.ProcessGroupGloo
_dead: list[Any] = []


class _Mourned:
    """A group; it outlives this object until it is buried."""

    _group: Any = None

    def __init__(self, *arguments: Any) -> None:
        self._group = _Gloo(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._group, name)

    def __del__(self) -> None:
        if self._group is not None:
            _dead.append(self._group)


def arrange() -> None:
    """From now on groups end when they are buried; those of torch's own making do as ever."""
    mock.patch.object(dist, "ProcessGroupGloo", _Mourned).start()


def bury(*, waiting: bool = True) -> None:
    """End the groups that nobody has any more, in a thread."""
    dead = _dead[:]
    _dead.clear()
    thread = threading.Thread(target=dead.clear, daemon=True)
    thread.start()
    if waiting:
        thread.join()
