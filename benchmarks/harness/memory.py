"""Peak memory of a stretch of a program, and a limit that is enforced.

On CUDA both are the caching allocator's: what tensors took (allocated) and what it had asked the
device for (reserved). The CPU has no such counter: there, on Linux, both are by how much the
process' resident memory grew, and the limit is one of its data segment.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import mmap
import resource
from pathlib import Path

import torch
from torch import nn

from rtp_wrap import RotatedTensorParallel

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_SPARE = 4 * 2**20
_RESET_PEAK = "5"  # proc(5): clear_refs


class Memory:
    """Counts from construction on; ``limit_mib``, if any, holds until the end of the context."""

    def __init__(self, device: torch.device, limit_mib: float | None = None) -> None:
        self._device = device
        self._beside = 0
        #: Given up at the end, where there may be no memory left to lift the limit with.
        self._spare = mmap.mmap(-1, _SPARE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._release()
        self._before = 0 if device.type == "cuda" else _status("VmRSS")
        self._limit = None if limit_mib is None else int(limit_mib * 2**20)
        self._enforce()

    def __enter__(self) -> Memory:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._spare.close()
        self._lift()  # at once: to report an exception takes memory as well
        if kind is None:
            self._release()

    def restart(self) -> None:
        """Forget the peak so far."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            _CLEAR.write_text(_RESET_PEAK)

    def see(self, model: nn.Module) -> None:
        """Count what ``model`` has on a GPU that is not the allocator's: a staging for peers."""
        if self._device.type == "cuda" and isinstance(model, RotatedTensorParallel):
            self._beside = model.staging_bytes if model.transport == "peer" else 0
            self._enforce()

    def peak(self) -> tuple[int, int]:
        """Bytes allocated and reserved, at most, since the last ``restart``."""
        if self._device.type == "cuda":
            allocated = torch.cuda.max_memory_allocated(self._device)
            reserved = torch.cuda.max_memory_reserved(self._device)
            return allocated + self._beside, reserved + self._beside
        grown = _status("VmHWM") - self._before
        return grown, grown

    def _lift(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0, self._device)
        else:
            hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
            resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))

    def _release(self) -> None:
        """Give back what is free."""
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()
        else:
            ctypes.CDLL(None).malloc_trim(0)
        self.restart()

    def _enforce(self) -> None:
        if self._limit is None:
            return
        if self._device.type == "cuda":
            total = torch.cuda.get_device_properties(self._device).total_memory
            left = max(0, self._limit - self._beside)
            torch.cuda.set_per_process_memory_fraction(min(1.0, left / total), self._device)
        else:
            hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
            resource.setrlimit(resource.RLIMIT_DATA, (_data_at_first() + self._limit, hard))


@functools.cache
def _data_at_first() -> int:
    """Of the first limit: memory that was freed may stay in the segment, for the next to use."""
    return _status("VmData")


def _status(field: str) -> int:
    """Bytes of a line of this process' status; see proc(5)."""
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"{_STATUS} has no {field}")
