"""Telling whether a parameter was written."""

from __future__ import annotations

from torch.distributed.tensor import DTensor


def versions_of(parameter: DTensor) -> tuple[int, int]:
    """In-place operations bump the version of the DTensor, direct ones that of its local tensor.

    Those of inference mode have none; what was made there is in no graph.
    """
    if parameter.is_inference():
        return 0, 0
    return parameter._version, parameter._local_tensor._version
