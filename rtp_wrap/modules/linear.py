"""``nn.Linear``, and Hugging Face's ``Conv1D``, with a rotating weight."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from rtp_wrap.modules.adoption import Adoption
from rtp_wrap.modules.frame import frame_of
from rtp_wrap.modules.rotated import Rotated, rotates_weight
from rtp_wrap.ops import rotated_linear
from rtp_wrap.ops.captured import CapturedLinear, Order, captured_linear


class RotatedLinear(Rotated):
    """An adopted ``nn.Linear``: ``[..., in_features]`` to ``[..., out_features]``.

    The weight rotates; the bias is a parameter like any other (replicated or gathered).
    """

    bias: torch.Tensor | None
    _compiles = True
    #: Whether the weight is ``[in_features, out_features]``.
    _transposed = False

    @staticmethod
    def rotation_dim(module: nn.Module, name: str) -> int | None:
        return 0 if rotates_weight(module, name, nn.Linear) else None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        adoption = self._adoption
        if adoption is None or adoption.ring.world_size == 1:
            return super().forward(input)  # nothing to rotate: torch's own linear, bit for bit
        if self._captured is not None and torch.compiler.is_compiling():
            return captured_linear(input, self.bias, self._captured["inputs"])
        if input.is_nested:
            return self._on_values(input)
        with frame_of(self, adoption):
            return rotated_linear(
                input,
                self.home("weight"),
                self.bias,
                adoption.ring,
                self.site,
                transposed=self._transposed,
            )

    def _capture(self, adoption: Adoption, order: Order) -> dict[str, Any]:
        captured = super()._capture(adoption, order)
        if adoption.ring.world_size > 1:
            weight, layer = self.home("weight"), vars(self).get("_layer")
            # Another weight (functional_call) is another layer's: backwards to come have theirs.
            if layer is None or not layer.is_of(weight):
                layer = CapturedLinear(adoption.ring, self.site, self._transposed)
                vars(self)["_layer"] = layer
            captured["inputs"] = layer.inputs(weight, order)
        return captured


class RotatedConv1D(RotatedLinear):
    """An adopted ``Conv1D`` of Hugging Face, a linear layer with weight ``[in, out]``."""

    _transposed = True

    @staticmethod
    def rotation_dim(module: nn.Module, name: str) -> int | None:
        # Whoever has made one has imported this; nobody else should have to.
        library = sys.modules.get("transformers.pytorch_utils")
        return 1 if library and rotates_weight(module, name, library.Conv1D) else None
