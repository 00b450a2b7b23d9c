"""``nn.Linear`` with a rotating weight."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from rtp_wrap.modules.adopted import Adopted
from rtp_wrap.modules.frame import Frame
from rtp_wrap.ops import rotated_linear


class RotatedLinear(Adopted):
    """An adopted ``nn.Linear``: ``[..., in_features]`` to ``[..., out_features]``.

    The weight rotates; the bias is a parameter like any other (replicated or gathered).
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        adoption = self._adoption
        if adoption is None or adoption.ring.world_size == 1:
            return super().forward(input)  # nothing to rotate: torch's own linear, bit for bit
        weight = self._parameters["weight"]
        assert isinstance(weight, DTensor)
        fqn = adoption.fqn or "the root nn.Linear"
        with Frame(self, adoption):
            return rotated_linear(input, weight, self.bias, adoption.ring.key, fqn)

    def extra_repr(self) -> str:
        adoption = self._adoption
        if adoption is None:
            return super().extra_repr()
        rotation = f"{adoption.strategies['weight']}, 1/{adoption.ring.world_size}"
        return f"{super().extra_repr()}, {rotation}"


def is_rotatable_linear(module: nn.Module, name: str) -> bool:
    """Whether ``name`` is the weight of a linear layer whose forward is ``nn.Linear``'s own."""
    if not isinstance(module, nn.Linear):
        return False
    weight = module._parameters.get(name)
    return (
        type(module).forward is nn.Linear.forward
        and "forward" not in vars(module)
        and name == "weight"
        and weight is not None
        and weight.dim() == 2
        and weight.numel() > 0
        and weight.is_floating_point()
    )
