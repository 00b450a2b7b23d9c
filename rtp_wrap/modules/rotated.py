"""What all rotated forms of modules have in common."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from rtp_wrap.modules.adopted import Adopted
from rtp_wrap.modules.misuse import check_counts_writes, check_in_place, check_untransformed
from rtp_wrap.policy import Rotate


class Rotated(Adopted):
    """An adopted module whose forward computes on rotating tiles."""

    _compiles = False

    @staticmethod
    def rotation_dim(module: nn.Module, name: str) -> int | None:
        """The dim along which parameter ``name`` of ``module`` is rotated by default.

        That of the output features. ``None`` if this form does not rotate it.
        """
        raise NotImplementedError

    def home(self, name: str) -> DTensor:
        """The home shard of a parameter, where the attribute would be the whole."""
        assert self._adoption is not None
        fqn = self._adoption.name(name)
        check_untransformed(fqn, self._adoption.ring)
        return check_counts_writes(check_in_place(self._parameters.get(name), fqn), fqn)

    def _on_values(self, nested: Any) -> torch.Tensor:
        """``forward`` of all rows of a jagged nested tensor at once, nested like it."""
        if nested.layout != torch.jagged:
            raise TypeError(
                f"{self.site}: a rotated layer takes nested tensors of layout torch.jagged only: "
                f"make it one, or keep the layer's weight by Gather() in the policy"
            )
        return torch.nested.nested_tensor_from_jagged(
            self.forward(nested.values()),
            nested.offsets(),
            nested.lengths(),
            jagged_dim=nested._ragged_idx,
        )

    @property
    def site(self) -> str:
        """The layer's name in errors and events."""
        fqn = self._adoption.fqn if self._adoption else ""
        return fqn or f"the root {type(self).__name__}"

    def extra_repr(self) -> str:
        if self._adoption is None:
            return super().extra_repr()
        rotations = [
            f"{name}: {strategy}"
            for name, strategy in self._adoption.strategies.items()
            if isinstance(strategy, Rotate)
        ]
        if not rotations:
            return super().extra_repr()
        kept = f"1/{self._adoption.ring.world_size} per rank"
        return ", ".join(filter(None, [super().extra_repr(), *rotations, kept]))


def rotates_weight(
    module: nn.Module,
    name: str,
    *originals: type[nn.Module],
    methods: tuple[str, ...] = ("forward",),
) -> bool:
    """Whether ``name`` is the weight of one of ``originals``, and tiles can be cut from it.

    ``methods`` are those that the rotated form replaces.
    """
    return (
        name == "weight"
        and any(keeps(module, each, *methods) for each in originals)
        and may_rotate(module._parameters.get(name))
    )


def may_rotate(weight: torch.Tensor | None) -> bool:
    """Whether tiles can be cut from ``weight``."""
    return (
        weight is not None
        and weight.dim() >= 2
        and weight.numel() > 0
        and weight.is_floating_point()
    )


def keeps(module: nn.Module, original: type[nn.Module], *methods: str) -> bool:
    """Whether ``module`` is an ``original`` whose ``methods`` nobody has overridden.

    A rotated form replaces what these compute; with another body they would be lost.
    """
    return isinstance(module, original) and all(
        getattr(type(module), method) is getattr(original, method) and method not in vars(module)
        for method in methods
    )
