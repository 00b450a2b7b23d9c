"""Telling whether a parameter was written."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.distributed.tensor import DTensor


def version_of(tensor: torch.Tensor) -> int:
    """Those of inference mode have none, and are in no graph."""
    return 0 if tensor.is_inference() else tensor._version


def versions_of(parameter: DTensor) -> tuple[int, int]:
    """In-place operations bump the version of the DTensor, direct ones that of its local tensor."""
    return version_of(parameter), version_of(parameter._local_tensor)


class Stamp(NamedTuple):
    """Where a plain tensor was, and its version then."""

    address: int
    version: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Stamp:
        return cls(tensor.data_ptr(), version_of(tensor))

    def was_written(self, tensor: torch.Tensor) -> bool:
        """Since. Moving it is no write: cuDNN puts the weights of an LSTM into one piece."""
        return tensor.data_ptr() == self.address and version_of(tensor) != self.version
