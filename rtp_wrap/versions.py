"""Telling whether a parameter was written."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor


def version_of(tensor: torch.Tensor) -> int:
    """Of a plain tensor; those of inference mode have none, and are in no graph."""
    return 0 if tensor.is_inference() else tensor._version


def versions_of(parameter: DTensor) -> tuple[int, int]:
    """In-place operations bump the version of the DTensor, direct ones that of its local tensor.

    Those of inference mode have none; what was made there is in no graph.
    """
    if parameter.is_inference():
        return 0, 0
    return parameter._version, parameter._local_tensor._version
