"""Batch and instance norms that keep running statistics."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from rtp_wrap.modules.adopted import Adopted
from rtp_wrap.modules.adoption import Adoption
from rtp_wrap.policy import MixedPrecisionPolicy


class AdoptedNorm(Adopted):
    """Normalises this rank's own batch, and begins every forward with rank 0's statistics.

    That is what ``DistributedDataParallel`` does: after a training step each rank's statistics have
    seen its own batch, and before the next use rank 0's replace them. The exchange is here and not
    at the wrapper's entry, so that it also holds for models that are entered by an inner module.
    """

    _compiles = False
    training: bool
    #: Whether this rank's batches went into the statistics since they were rank 0's.
    _has_own_statistics = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        adoption = self._adoption
        if adoption is not None and adoption.ring.rings.size > 1:
            if self._has_own_statistics:
                self._take_statistics_of_rank_0(adoption)
            vars(self)["_has_own_statistics"] = self.training
        return super().forward(*args, **kwargs)

    def _take_statistics_of_rank_0(self, adoption: Adoption) -> None:
        ring = adoption.ring
        ring.begin(f"{adoption.fqn} running statistics")
        # One message. The widest first, so that each part is aligned to its dtype.
        buffers = sorted(self.buffers(recurse=False), key=lambda each: -each.itemsize)
        with torch.no_grad():
            message = torch.cat([each.reshape(-1).view(torch.uint8) for each in buffers])
            ring.rings.broadcast(message)
            parts = message.split([each.nbytes for each in buffers])
            for each, part in zip(buffers, parts, strict=True):
                # Past the version counter, as torch's own kernels write statistics: a backward that
                # is still to come does not read them.
                each.data.copy_(part.view(each.dtype).view(each.shape))


def has_own_statistics(module: nn.Module) -> bool:
    """Whether ``module`` gathers statistics of the batches of one rank."""
    return _has_statistics(module) and not isinstance(module, nn.SyncBatchNorm)


def precision_of(module: nn.Module, precision: MixedPrecisionPolicy) -> MixedPrecisionPolicy:
    """``precision`` for the module's own parameters.

    Running statistics are buffers, which keep their dtype, and torch's kernels want weights of the
    same; they take inputs of another one.
    """
    return replace(precision, param_dtype=None) if _has_statistics(module) else precision


def _has_statistics(module: nn.Module) -> bool:
    return isinstance(module, _NormBase) and module._buffers.get("running_mean") is not None
