"""Memory of one process that the other processes of a host read: what peers are on CPUs."""

from __future__ import annotations

import os
import tempfile
import weakref
from pathlib import Path

import torch
import torch.distributed as dist

from rtp_wrap.engine import unhooked
from rtp_wrap.host_group import host_group, timeout_of
from rtp_wrap.transport.cells import Copies, PeerError

_DIRECTORY = Path("/dev/shm")


class SharedMemory:
    """``nbytes`` of each process of ``group``, in a file that has no name any more.

    The same interface as ``SymmetricMemory``; work is done at once, so barriers block the host.
    """

    def __init__(
        self, group: dist.ProcessGroup, device: torch.device, nbytes: int, lanes: int
    ) -> None:
        self.rank, self.world_size = group.rank(), group.size()
        self._nbytes = nbytes
        directory = _DIRECTORY if _DIRECTORY.is_dir() else None
        handle, name = tempfile.mkstemp(prefix=f"rtp-{os.getpid()}-", dir=directory)
        self._name = name
        self._unlink = weakref.finalize(self, Path(name).unlink, missing_ok=True)
        try:
            os.posix_fallocate(handle, 0, nbytes)  # or a write beyond what there is would be fatal
        finally:
            os.close(handle)
        self._own = _mapped(name, nbytes)

    def meet(self, group: dist.ProcessGroup) -> None:
        """Open the memory of all ranks. All ranks call this together."""
        try:
            self._store, self._host = host_group(
                group.get_group_store(), self.rank, self.world_size, timeout_of(group)
            )
            self._store.set(f"memory-{self.rank}", self._name)
            names = [self._store.get(f"memory-{rank}") for rank in range(self.world_size)]
            self._all = [_mapped(name.decode(), self._nbytes) for name in names]
            self._all[self.rank] = self._own
            self._wait()
        finally:
            self._unlink()

    def of(self, owner: int) -> torch.Tensor:
        """The memory of rank ``owner``, 1-D uint8."""
        return self._all[owner]

    def capture(self, stream: object) -> int:
        """There are no graphs here."""
        return 0

    def prepared(self, copies: Copies) -> Copies:
        """The copies themselves."""
        return copies

    def copy(self, prepared: Copies, stream: object = None) -> None:
        """Make them, at once."""
        for to, source in prepared:
            to.copy_(source)

    def barrier(self, lane: int, flag: int, stream: object = None) -> None:
        """Go on when every rank has come here. ``PeerError`` after the group's timeout."""
        try:
            self._wait()
        except RuntimeError as error:
            raise PeerError(str(error)) from error

    def _wait(self) -> None:
        # It is kept for the reason for which Lockstep keeps its last comparison.
        self._last = last = unhooked(self._host.barrier)
        last.wait()


def _mapped(name: str, nbytes: int) -> torch.Tensor:
    return torch.from_file(name, shared=True, size=nbytes, dtype=torch.uint8, device="cpu")
