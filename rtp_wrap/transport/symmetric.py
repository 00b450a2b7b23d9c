"""Memory of one GPU that the other GPUs of a host read with their copy engines.

The only file that knows ``torch.distributed._symmetric_memory``, which is private, and the CUDA
driver. Ranks wait for each other on their streams, by flags that the streams' front ends write and
poll (``cuStreamBatchMemOp``): no kernel, hence no multiprocessor, takes part in it.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory

from rtp_wrap.host_group import timeout_of
from rtp_wrap.streams import current_stream
from rtp_wrap.transport.cells import Copies
from rtp_wrap.transport.watchdog import Watchdog

_WAIT, _WRITE = 1, 2  # CU_STREAM_MEM_OP_{WAIT,WRITE}_VALUE_32
_EQUAL = 1  # CU_STREAM_WAIT_VALUE_EQ
_FLAG_BYTES = 4
#: Of every lane, used in turn.
_FLAGS = 5


class _Operation(ctypes.Structure):
    """``CUstreamBatchMemOpParams`` of the CUDA driver API: a 32-bit wait or write."""

    _fields_ = (
        ("operation", ctypes.c_uint32),
        ("_padding", ctypes.c_uint32),
        ("address", ctypes.c_uint64),
        ("value", ctypes.c_uint64),
        ("flags", ctypes.c_uint32),
        ("_more_padding", ctypes.c_uint32),
        ("alias", ctypes.c_uint64),
        ("_reserved", ctypes.c_uint64),
    )


class SymmetricMemory:
    """``nbytes`` on each GPU of ``group``; a rank reads those of the others.

    Not in ``torch.cuda.memory_allocated()``. ``lanes`` are independent sequences of barriers; the
    barriers of one lane are called on one stream, in the same order on every rank.
    """

    #: How often this process met others. It must be the same on all who meet: torch numbers its
    #: messages by a counter of the process, whatever the group.
    meetings = 0

    def __init__(
        self, group: dist.ProcessGroup, device: torch.device, nbytes: int, lanes: int
    ) -> None:
        self.rank, self.world_size = group.rank(), group.size()
        flags = lanes * _FLAGS * self.world_size
        self._flags_at = -(-nbytes // 256) * 256
        size = self._flags_at + flags * _FLAG_BYTES
        self._nbytes = nbytes
        self._lanes = lanes
        self._device = device
        self._buffer = symmetric_memory.empty(size, dtype=torch.uint8, device=device)
        self._buffer.zero_()
        torch.cuda.synchronize(device)  # flags are 0 before anyone can write to them

    def meet(self, group: dist.ProcessGroup) -> None:
        """Make the memory of all ranks readable. All ranks call this together."""
        SymmetricMemory.meetings += 1
        self._handle: Any = symmetric_memory.rendezvous(self._buffer, group)
        self._watchdog = Watchdog(self._lanes, timeout_of(group), dist.get_rank())
        self._barriers = [
            [self._operations(lane, flag) for flag in range(_FLAGS)] for lane in range(self._lanes)
        ]

    def of(self, owner: int) -> torch.Tensor:
        """The memory of rank ``owner``, 1-D uint8."""
        if owner == self.rank:
            return self._buffer[: self._nbytes]
        whole: torch.Tensor = self._handle.get_buffer(owner, (self._nbytes,), torch.uint8)
        return whole

    def capture(self, stream: torch.cuda.Stream) -> int:
        """The number of the graph that ``stream`` is being captured in; each has its own."""
        status, number = ctypes.c_int(), ctypes.c_uint64()
        handle, wanted = ctypes.c_void_p(stream.cuda_stream), (status, number)
        pointers = *map(ctypes.byref, wanted), None, None, None
        _check(driver().cuStreamGetCaptureInfo_v2(handle, *pointers))
        return number.value

    def prepared(self, copies: Copies) -> list[tuple[int, int, int]]:
        """The copies as addresses and bytes: ``Tensor.copy_`` takes the host four times as long."""
        return [(to.data_ptr(), source.data_ptr(), to.nbytes) for to, source in copies]

    def copy(
        self, prepared: list[tuple[int, int, int]], stream: torch.cuda.Stream | None = None
    ) -> None:
        """Make them, by copy engines, on ``stream`` (default: the current one)."""
        handle = (stream or current_stream(self._device)).cuda_stream
        for to, source, nbytes in prepared:
            _check(driver().cuMemcpyAsync(to, source, nbytes, handle))

    def barrier(self, lane: int, flag: int, stream: torch.cuda.Stream | None = None) -> None:
        """The ranks' work on ``stream`` (default: the current) goes on when all have come here.

        What a rank wrote on its stream before is seen after it. ``flag`` is one of 0 to 4, and
        never the one of the lane's barrier before.
        """
        operations = self._barriers[lane][flag]
        length = len(operations)
        if torch.cuda.is_current_stream_capturing():
            length -= 1  # a replay would report the same progress again
        else:
            self._watchdog.enqueued[lane] += 1
            operations[-1].value = self._watchdog.enqueued[lane]
        handle = (stream or current_stream(self._device)).cuda_stream
        _check(driver().cuStreamBatchMemOp_v2(handle, length, operations, 0))

    def _operations(self, lane: int, flag: int) -> Any:
        """Tell all ranks, wait for all of them, take their flags down again, report progress.

        A rank has one of each flag for each other rank. That a rank has raised another flag since
        shows that it has taken down the one before, so that it may be raised again. Flags, not
        counts: a captured graph repeats the same values.
        """
        addresses = self._handle.buffer_ptrs
        first = self._flags_at + (lane * _FLAGS + flag) * self.world_size * _FLAG_BYTES
        progress = self._watchdog.done.data_ptr() + lane * _FLAG_BYTES
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        theirs = [addresses[other] + first + self.rank * _FLAG_BYTES for other in others]
        mine = [addresses[self.rank] + first + other * _FLAG_BYTES for other in others]
        return _array(
            [
                *[_Operation(operation=_WRITE, address=address, value=1) for address in theirs],
                *[
                    _Operation(operation=_WAIT, address=address, value=1, flags=_EQUAL)
                    for address in mine
                ],
                *[_Operation(operation=_WRITE, address=address, value=0) for address in mine],
                _Operation(operation=_WRITE, address=progress),
            ]
        )


def _array(operations: Sequence[_Operation]) -> Any:
    return (_Operation * len(operations))(*operations)


@functools.cache
def driver() -> Any:
    """The CUDA driver; ``OSError`` or ``AttributeError`` where it is not there or too old."""
    driver = ctypes.CDLL("libcuda.so.1")
    driver.cuStreamGetCaptureInfo_v2.restype = ctypes.c_int  # as all have; it is looked up here
    driver.cuStreamBatchMemOp_v2.argtypes = (
        ctypes.c_void_p,
        ctypes.c_uint,
        ctypes.POINTER(_Operation),
        ctypes.c_uint,
    )
    driver.cuMemcpyAsync.argtypes = (
        ctypes.c_uint64,
        ctypes.c_uint64,
        ctypes.c_size_t,
        ctypes.c_void_p,
    )
    return driver


def _check(error: int) -> None:
    if error:
        raise RuntimeError(f"the CUDA driver refused a transfer between GPUs: error {error}")
