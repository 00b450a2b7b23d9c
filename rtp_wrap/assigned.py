"""Finding parameters whose ``.data`` was assigned.

On a DTensor that replaces the storage that torch shows, not the local tensor that holds the values:
what was assigned would never be read, and nothing would tell.
"""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor

from rtp_wrap.attached import Attached


class _Shown(Attached):
    """Of a parameter: its name, and the storage that it shows.

    The storage itself, not its address, which a later one could get.
    """

    __slots__ = ("fqn", "storage")

    def __init__(self, fqn: str, storage: torch.UntypedStorage) -> None:
        self.fqn, self.storage = fqn, storage


def note(parameter: DTensor, fqn: str) -> None:
    """Remember a parameter as it is, if it is not known yet.

    Copies, and what conversions and ``load_state_dict(assign=True)`` put in its place, are not.
    """
    if not vars(parameter).get("_shown"):
        parameter._shown = _Shown(fqn, parameter.untyped_storage())  # type: ignore[attr-defined]


def check(parameter: DTensor) -> bool:
    """Whether the parameter is known. Raises if its ``.data`` was assigned since.

    This runs at every use of a weight, so it must be quick.
    """
    shown: _Shown | None = vars(parameter).get("_shown")
    if not shown:
        return False
    if shown.storage is not parameter.untyped_storage():
        raise RuntimeError(
            f"{shown.fqn}: its .data was replaced after wrapping, where nothing reads it, and "
            f"the weight is what it was. Write in place: parameter.data.mul_(...), "
            f"parameter.data.copy_(another DTensor), or parameter.lerp_(...) under "
            f"torch.no_grad()"
        )
    return True
