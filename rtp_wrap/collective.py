"""A collective by the name of what it is for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from rtp_wrap.profiling import profiler_range
from rtp_wrap.ring import Ring


@contextmanager
def collective(operation: str, fqn: str, ring: Ring) -> Iterator[None]:
    """A block with a collective, which has its name in a profiler's trace, and in errors."""
    try:
        with profiler_range(operation, fqn):
            yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ring.not_answered(f"{fqn} {operation}", str(error)) from error
