"""What is remembered of a tensor, as an attribute of it."""

from __future__ import annotations

from typing import Any


class Attached:
    """Belongs to one tensor, and not to its copies in memory and in files.

    Those get an empty set in its place, which ``torch.load`` takes with ``weights_only`` as well.
    """

    __slots__ = ()

    def __reduce__(self) -> tuple[Any, ...]:
        return set, ()
