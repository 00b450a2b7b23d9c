"""The sharded forms of modules, and which module takes which."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from rtp_wrap.modules.adopted import (
    Adopted,
    AdoptedOptimizedModule,
    AdoptedParameterList,
    add_forward_method,
    adopt,
    is_optimized,
)
from rtp_wrap.modules.adoption import Adoption
from rtp_wrap.modules.attention import RotatedMultiheadAttention, can_rotate
from rtp_wrap.modules.conv import RotatedConv, RotatedConvTranspose
from rtp_wrap.modules.embedding import RotatedEmbedding, RotatedEmbeddingBag, refuse_max_norm
from rtp_wrap.modules.linear import RotatedConv1D, RotatedLinear
from rtp_wrap.modules.norm import AdoptedNorm, has_own_statistics, precision_of
from rtp_wrap.modules.recurrent import AdoptedRecurrent, is_recurrent
from rtp_wrap.modules.rotated import Rotated
from rtp_wrap.modules.transformer import without_fast_path
from rtp_wrap.policy import Rotate, Strategy

__all__ = [
    "Adopted",
    "Adoption",
    "Rotated",
    "add_forward_method",
    "adopt",
    "form_of",
    "has_own_statistics",
    "precision_of",
    "refuse_max_norm",
    "rotation_dim",
]

_ROTATED: tuple[type[Rotated], ...] = (
    RotatedLinear,
    RotatedConv1D,
    RotatedConv,
    RotatedConvTranspose,
    RotatedEmbedding,
    RotatedEmbeddingBag,
    RotatedMultiheadAttention,
)

#: What becomes of every module's own parameters.
Strategies = Mapping[nn.Module, Mapping[str, Strategy]]


def rotation_dim(module: nn.Module, name: str) -> int | None:
    """The dim along which parameter ``name`` of ``module`` is rotated by default.

    ``None`` if it has no rotated form.
    """
    for form in _ROTATED:
        dim = form.rotation_dim(module, name)
        if dim is not None:
            return dim
    return None


def form_of(module: nn.Module, adoption: Adoption, strategies: Strategies) -> type[Adopted]:
    """The class to mix into ``module`` for what becomes of its parameters and those below it."""
    for name, strategy in adoption.strategies.items():
        if isinstance(strategy, Rotate):
            return next(form for form in _ROTATED if form.rotation_dim(module, name) is not None)
    # These read weights of modules below them, whole.
    if can_rotate(module) and _rotates(module._modules.get("out_proj"), strategies):
        return RotatedMultiheadAttention
    if adoption.ring.world_size > 1 and any(_rotates(m, strategies) for m in module.modules()):
        closed = without_fast_path(module)
        if closed is not None:
            return closed
    if is_optimized(module):
        return AdoptedOptimizedModule
    if isinstance(module, nn.ParameterList):
        return AdoptedParameterList
    if has_own_statistics(module):
        return AdoptedNorm
    return AdoptedRecurrent if is_recurrent(module) else Adopted


def _rotates(module: nn.Module | None, strategies: Strategies) -> bool:
    own = {} if module is None else strategies.get(module, {})
    return any(isinstance(strategy, Rotate) for strategy in own.values())
