"""Finding weights that were written between a forward and its backward."""

from __future__ import annotations

from torch.distributed.tensor import DTensor

from rtp_wrap.ring import Ring, register
from rtp_wrap.versions import versions_of


class WriteCheck:
    """Remembers the versions of a parameter; ``check`` raises if it was written since.

    Optimizer steps, which bump no version, are counted by the ring's hooks, for which the parameter
    is marked anew here: a mark does not survive ``deepcopy``, ``.to()`` or ``.half()``.
    ``versions`` are those of an earlier check of the same parameter, to go on with.
    """

    __slots__ = ("_fqn", "_parameter", "versions")

    def __init__(
        self,
        parameter: DTensor,
        fqn: str,
        ring: Ring,
        versions: tuple[int, ...] | None = None,
    ) -> None:
        register(parameter, ring)
        self._parameter, self._fqn = parameter, fqn
        self.versions = versions_of(parameter) if versions is None else versions

    def check(self) -> None:
        if versions_of(self._parameter) != self.versions:
            raise RuntimeError(
                f"{self._fqn} was written (by an optimizer step, load_state_dict or an in-place "
                f"operation) between a forward and its backward, so its gradients would belong to "
                f"no model; run backward before the write, or the forward again after it"
            )
