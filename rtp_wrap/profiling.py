"""What a profiler shows of this library: ranges named by the operation and the parameter."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch.autograd import profiler
from torch.profiler import record_function

_NOTHING = nullcontext()


def profiler_range(operation: str, fqn: str) -> AbstractContextManager[object]:
    """A block that traces show as ``RTP::operation (fqn)``.

    In those of ``torch.profiler``, and as a range of NVTX under ``emit_nvtx``. Without either it
    costs the host next to nothing, unlike ``record_function``.
    """
    # No public name tells; code that Inductor generates reads this one, too.
    if not profiler._is_profiler_enabled:
        return _NOTHING
    return record_function(f"RTP::{operation} ({fqn})")
