"""``torch.autograd.detect_anomaly()`` over gradients that are DTensors."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.experimental import register_sharding


def let_anomalies_be_detected(mesh: DeviceMesh) -> None:
    """Teach DTensor the operation by which anomaly mode asks for NaNs, where torch has not.

    It is asked of the whole mask, gathered, so that a NaN in one rank's shard is an error on all.
    """
    mask = torch.zeros(1, dtype=torch.bool, device=mesh.device_type)
    try:
        torch._is_any_true(DTensor.from_local(mask, mesh, [Replicate()], run_check=False))
    except NotImplementedError:
        register_sharding(torch.ops.aten._is_any_true.default)(_of_the_whole)


def _of_the_whole(mask: object) -> list[tuple[list[Replicate], list[Replicate]]]:
    return [([Replicate()], [Replicate()])]
