"""The sharded forms of modules, and which module takes which."""

from __future__ import annotations

from torch import nn

from rtp_wrap.modules.adopted import Adopted, AdoptedParameterList, adopt
from rtp_wrap.modules.adoption import Adoption
from rtp_wrap.modules.frame import Frame
from rtp_wrap.modules.linear import RotatedLinear, is_rotatable_linear
from rtp_wrap.modules.recurrent import AdoptedRecurrent, is_recurrent
from rtp_wrap.policy import Rotate

__all__ = ["Adopted", "Adoption", "Frame", "RotatedLinear", "adopt", "form_of", "is_rotatable"]


def is_rotatable(module: nn.Module, name: str) -> bool:
    """Whether parameter ``name`` of ``module`` has a rotated form."""
    return is_rotatable_linear(module, name)


def form_of(module: nn.Module, adoption: Adoption) -> type[Adopted]:
    """The class to mix into ``module`` for what becomes of its parameters."""
    if any(isinstance(strategy, Rotate) for strategy in adoption.strategies.values()):
        return RotatedLinear
    if isinstance(module, nn.ParameterList):
        return AdoptedParameterList
    return AdoptedRecurrent if is_recurrent(module) else Adopted
