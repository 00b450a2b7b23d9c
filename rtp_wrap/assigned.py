"""Finding parameters whose ``.data`` was assigned.

On a DTensor that replaces the storage that torch shows, not the local tensor that holds the values:
what was assigned would never be read, and nothing would tell.
"""

from __future__ import annotations

from weakref import finalize

import torch
from torch.distributed.tensor import DTensor


class Storages:
    """The storages that parameters show, by their local tensors.

    Copies, other dtypes and what ``load_state_dict(assign=True)`` puts in place have local tensors
    of their own, and so are other parameters here.
    """

    def __init__(self) -> None:
        # The storage itself, not its address, which a later one could get.
        self._known: dict[int, tuple[torch.UntypedStorage, str]] = {}

    def note(self, parameter: DTensor, fqn: str) -> None:
        """Remember a parameter as it is, if it is not known yet."""
        local = parameter._local_tensor
        if id(local) not in self._known:
            self._known[id(local)] = parameter.untyped_storage(), fqn
            finalize(local, self._known.pop, id(local), None).atexit = False

    def check(self, parameter: DTensor) -> bool:
        """Whether the parameter is known. Raises if its ``.data`` was assigned since.

        This runs at every use of a weight, and takes well below 1 µs.
        """
        known = self._known.get(id(parameter._local_tensor))
        if known is None:
            return False
        if known[0] is not parameter.untyped_storage():
            raise RuntimeError(
                f"{known[1]}: its .data was replaced after wrapping, where nothing reads it, and "
                f"the weight is what it was. Write in place: parameter.data.mul_(...), "
                f"parameter.data.copy_(another DTensor), or parameter.lerp_(...) under "
                f"torch.no_grad()"
            )
        return True
