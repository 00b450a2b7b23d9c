"""``nn.Conv1d``, ``nn.Conv2d``, ``nn.Conv3d`` and the transposed ones, with a rotating weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from rtp_wrap.modules.frame import frame_of
from rtp_wrap.modules.rotated import Rotated, rotates_weight
from rtp_wrap.ops import rotated_conv


class RotatedConv(Rotated):
    """An adopted ``nn.Conv1d``, ``2d`` or ``3d``: ``[B, in, *s]`` to ``[B, out, *t]``.

    The weight rotates; the bias is a parameter like any other (replicated or gathered).
    """

    bias: torch.Tensor | None
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | int | tuple[int, ...]
    padding_mode: str
    dilation: tuple[int, ...]
    groups: int
    _reversed_padding_repeated_twice: list[int]

    @staticmethod
    def rotation_dim(module: nn.Module, name: str) -> int | None:
        classes = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
        methods = ("forward", "_conv_forward")
        return 0 if rotates_weight(module, name, *classes, methods=methods) else None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        adoption = self._adoption
        if adoption is None or adoption.ring.world_size == 1:
            return super().forward(input)  # nothing to rotate: torch's own, bit for bit
        input, padding = self._padded(input)
        with frame_of(self, adoption):
            return rotated_conv(
                input,
                self.home("weight"),
                self.bias,
                adoption.ring,
                self.site,
                stride=self.stride,
                padding=padding,
                dilation=self.dilation,
                groups=self.groups,
            )

    def _padded(self, input: torch.Tensor) -> tuple[torch.Tensor, int | tuple[int, ...]]:
        """The input with what padding the convolution cannot do itself, and the padding it can."""
        if self.padding_mode != "zeros":
            padded = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            return padded, 0
        if not isinstance(self.padding, str):
            return input, self.padding
        if self.padding == "valid":
            return input, 0
        both = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        # Where the two sides cannot have the same, the far one has one more.
        uneven = [size for total in reversed(both) for size in (0, total % 2)]
        return F.pad(input, uneven) if any(uneven) else input, tuple(total // 2 for total in both)


class RotatedConvTranspose(Rotated):
    """An adopted ``nn.ConvTranspose1d``, ``2d`` or ``3d``: ``[B, in, *s]`` to ``[B, out, *t]``.

    The weight ``[in, out/groups, *k]`` rotates; the bias is a parameter like any other.
    """

    bias: torch.Tensor | None
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    _output_padding: Callable[..., Sequence[int]]

    @staticmethod
    def rotation_dim(module: nn.Module, name: str) -> int | None:
        classes = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
        return 1 if rotates_weight(module, name, *classes) else None

    def forward(
        self, input: torch.Tensor, output_size: Sequence[int] | None = None
    ) -> torch.Tensor:
        adoption = self._adoption
        if adoption is None or adoption.ring.world_size == 1:
            return super().forward(input, output_size)  # torch's own, bit for bit
        output_padding = self._output_padding(
            input,
            output_size,
            self.stride,
            self.padding,
            self.kernel_size,
            len(self.kernel_size),
            self.dilation,
        )
        with frame_of(self, adoption):
            return rotated_conv(
                input,
                self.home("weight"),
                self.bias,
                adoption.ring,
                self.site,
                stride=self.stride,
                padding=self.padding,
                dilation=self.dilation,
                transposed=True,
                output_padding=output_padding,
                groups=self.groups,
            )
