"""What tests of rotated layers share."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast
from unittest.mock import patch

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from rtp_wrap.lockstep import Lockstep
from rtp_wrap.ring import Ring
from rtp_wrap.transport.choice import VARIABLE
from tests.ranks import DEVICE_TYPE

dims = pytest.mark.parametrize("dim", [0, 1])
modes = pytest.mark.parametrize("inplace", [False, True], ids=["overlap", "inplace"])

#: The least staging: slots of 256 bytes, 32 numbers in fp64, in a backward; of twice that where no
#: weights travel (embeddings).
TINY = 1024


def mesh_of_rings(rings: int) -> DeviceMesh:
    """All ranks, in so many rings that replicate each other."""
    shape = rings, dist.get_world_size() // rings
    return init_device_mesh(DEVICE_TYPE, shape, mesh_dim_names=("replicate", "rotate"))


Rank = TypeVar("Rank", bound=Callable[..., Any])


def by_ring(function: Rank) -> Rank:
    """What a rank does, with models that it wraps by hops: the test looks into those."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with patch.dict(os.environ, {VARIABLE: "ring"}):
            return function(*args, **kwargs)

    return cast(Rank, wrapped)


#: What the compiler's own code is warned of, and hides from users.
COMPILERS_WARNINGS = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning"),
]


def no_communication() -> Any:
    """A context in which no rotation may begin."""
    return patch.object(Ring, "begin", side_effect=AssertionError("no communication"))


@contextmanager
def events() -> Iterator[list[str]]:
    """Every communicating operation of this rank, by name."""
    seen: list[str] = []
    record = Lockstep.record

    def recording(self: Lockstep, event: str, exchanges: int = 0) -> None:
        seen.append(event)
        record(self, event, exchanges)

    with patch.object(Lockstep, "record", recording):
        yield seen
