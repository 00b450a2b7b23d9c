"""The mesh over which a model is wrapped."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard


def mesh_of(group: dist.ProcessGroup | None, mesh: DeviceMesh | None) -> DeviceMesh:
    """The mesh to wrap over: ``mesh``, one of the ranks of ``group``, or one of all ranks.

    Raises ``RuntimeError`` without a process group, and ``ValueError`` or ``TypeError`` for a group
    or mesh that cannot be used, or that this rank is not in.
    """
    if not dist.is_initialized():
        raise RuntimeError(
            "RotatedTensorParallel needs a process group: start with torchrun and call "
            "torch.distributed.init_process_group() before wrapping"
        )
    if mesh is not None:
        if group is not None:
            raise ValueError("give either group or mesh, not both")
        if not isinstance(mesh, DeviceMesh):
            raise TypeError(f"mesh is a {type(mesh).__name__}, not a DeviceMesh")
        _check(mesh)
        return mesh
    group = group if group is not None else dist.group.WORLD
    outside: object = dist.GroupMember.NON_GROUP_MEMBER
    if group is outside:
        raise ValueError(f"rank {dist.get_rank()} is not in the group: wrap on its ranks only")
    if not isinstance(group, dist.ProcessGroup):
        hint = ": give it as mesh=" if isinstance(group, DeviceMesh) else ""
        raise TypeError(f"group is a {type(group).__name__}, not a ProcessGroup{hint}")
    on_cuda = torch.cuda.is_available() and "nccl" in str(dist.get_backend_config(group))
    # Named after the group: torch takes meshes of the same ranks and names for one, and remembers
    # them, so that a DTensor could end up with the mesh of another (or a destroyed) group.
    name = f"rtp:{group.group_name}"
    return DeviceMesh.from_group(group, "cuda" if on_cuda else "cpu", mesh_dim_names=(name,))


def _check(mesh: DeviceMesh) -> None:
    if mesh.ndim > 2:
        raise ValueError(
            f"mesh has the dimensions {mesh.mesh_dim_names or tuple(mesh.shape)}: give the slice "
            f'to shard over, for example mesh["rotate"], or with one in front that replicates, '
            f'mesh["replicate", "rotate"]'
        )
    if mesh.ndim == 2 and not mesh.mesh_dim_names:
        raise ValueError(
            f"the dimensions of the mesh of {tuple(mesh.shape)} have no names: give them, in the "
            f"order of the mesh, by init_device_mesh(..., "
            f'mesh_dim_names=("replicate", "rotate"))'
        )
    if mesh.get_coordinate() is None:
        raise ValueError(f"rank {dist.get_rank()} is not in the mesh: wrap on its ranks only")
    ranks = mesh.mesh
    if any((ranks.diff(dim=dim) < 0).any() for dim in range(mesh.ndim)):  # on all of them alike
        raise ValueError(
            f"the mesh has the ranks {ranks.tolist()}: torch's process groups have them in "
            f"ascending order, so that shards would be taken for those of other ranks; give a mesh "
            f"whose ranks ascend in every dimension"
        )


def placements(mesh: DeviceMesh, dim: int | None) -> list[Placement]:
    """Of a parameter that is sharded along ``dim`` in each ring, or not at all."""
    last = Replicate() if dim is None else Shard(dim)
    return [*(Replicate() for _ in range(mesh.ndim - 1)), last]
