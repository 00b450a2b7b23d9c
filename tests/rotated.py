"""What tests of rotated layers share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest

from rtp_wrap.lockstep import Lockstep

dims = pytest.mark.parametrize("dim", [0, 1])
modes = pytest.mark.parametrize("inplace", [False, True], ids=["overlap", "inplace"])

#: The least staging: slots of 256 bytes, 32 numbers in fp64, in a backward; of twice that where no
#: weights travel (embeddings).
TINY = 1024


@contextmanager
def events() -> Iterator[list[str]]:
    """Every communicating operation of this rank, by name."""
    seen: list[str] = []
    record = Lockstep.record

    def recording(self: Lockstep, event: str) -> None:
        seen.append(event)
        record(self, event)

    with patch.object(Lockstep, "record", recording):
        yield seen
