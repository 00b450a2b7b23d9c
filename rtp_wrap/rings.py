"""All ranks that share a model: one ring of them, or several rings with the same shards."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from rtp_wrap.host_group import host_group, timeout_of


class Rings:
    """The ranks of a 1-D ``mesh``, one ring, or those of a 2-D one, whose rows are rings.

    Collectives of all ranks are one in each ring and one across rings, in the groups that the mesh
    has: nothing is made for them that would have to be given back.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        #: That on which parameters are DTensors, and its row of this rank, in which tiles rotate.
        self.mesh, self.own_mesh = mesh, mesh
        #: The ranks of other rings with the same shards as this one; ``None`` if there is one ring.
        self.across: dist.ProcessGroup | None = None
        if mesh.ndim == 2:
            assert mesh.mesh_dim_names is not None
            self.own_mesh = mesh[mesh.mesh_dim_names[1]]
            if mesh.size(0) > 1:
                self.across = mesh.get_group(0)
        #: The ranks of this ring.
        self.own: dist.ProcessGroup = self.own_mesh.get_group()
        self.length, self.size = self.own.size(), mesh.size()
        self.count = self.size // self.length
        #: Of this rank among all, in the order of the mesh.
        self.place = self.place_of(self.own.rank())

    def place_of(self, rank: int) -> int:
        """That of a rank of this ring."""
        ring = 0 if self.across is None else self.across.rank()
        return ring * self.length + rank

    def connect(self) -> tuple[dist.Store, Any]:
        """A connection of all ranks on their hosts: a store, and a Gloo group (``host_group``).

        Raises ``RuntimeError`` where the others do not come within the group's timeout.
        """
        store = self.own.get_group_store()
        if self.across is not None:  # rings have stores of their own, and the job has one
            assert dist.group.WORLD is not None
            name = hashlib.sha1(str(self.mesh.mesh.tolist()).encode()).hexdigest()
            store = dist.PrefixStore(f"rtp_wrap/{name}", dist.group.WORLD.get_group_store())
        try:
            return host_group(store, self.place, self.size, timeout_of(self.own))
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {self.place} of the {self.count} x {self.length} ranks "
                f"{self.mesh.mesh.tolist()} waited in vain for the others to wrap a model "
                f"({error}): all ranks of a mesh or group wrap over it together, each with the same"
            ) from error

    def broadcast(self, values: torch.Tensor) -> None:
        """Put the values of the rank in place 0 into those of all."""
        if self.across is not None and self.own.rank() == 0:
            dist.broadcast(values, dist.get_global_rank(self.across, 0), group=self.across)
        self._broadcast_in_ring(values)

    def _broadcast_in_ring(self, values: torch.Tensor) -> None:
        if self.length > 1:
            dist.broadcast(values, dist.get_global_rank(self.own, 0), group=self.own)

    def average(self, values: torch.Tensor) -> None:
        """Put the mean of all ranks' values in their place, to the bit the same on all of them.

        It is summed in their dtype.
        """
        _average(values, self.own)
        if self.across is not None:
            # Not by each rank of a ring: their groups may add up in another order.
            if self.own.rank() == 0:
                _average(values, self.across)
            self._broadcast_in_ring(values)


def _average(values: torch.Tensor, group: dist.ProcessGroup) -> None:
    if group.size() > 1:
        put_mean(values, group.size(), lambda: dist.all_reduce(values, group=group))


def put_mean(values: torch.Tensor, ranks: int, put_sum: Callable[[], object]) -> None:
    """Put the mean of the ``values`` of so many ranks in their place.

    ``put_sum`` puts the sum there.
    """
    divides_first = values.itemsize < 4  # as a sum of 16 bits could overflow
    if divides_first:
        values.div_(ranks)
    put_sum()
    if not divides_first:
        values.div_(ranks)
