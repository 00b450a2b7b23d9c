"""``nn.Embedding`` and ``nn.EmbeddingBag`` with a rotating weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from rtp_wrap.modules.frame import frame_of
from rtp_wrap.modules.rotated import Rotated, rotates_weight
from rtp_wrap.ops import rotated_embedding
from rtp_wrap.ring import Ring


class _Rows(Rotated):
    padding_idx: int | None
    scale_grad_by_freq: bool

    def _rows(self, ids: torch.Tensor, ring: Ring) -> torch.Tensor:
        return rotated_embedding(
            ids,
            self.home("weight"),
            ring,
            self.site,
            padding_idx=self.padding_idx,
            scale_grad_by_freq=self.scale_grad_by_freq,
        )


class RotatedEmbedding(_Rows):
    """An adopted ``nn.Embedding``: ids ``[...]`` to ``[..., embedding_dim]``."""

    @staticmethod
    def rotation_dim(module: nn.Module, name: str) -> int | None:
        return 0 if _rotates(module, name, nn.Embedding) else None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        adoption = self._adoption
        if adoption is None or adoption.ring.world_size == 1:
            return super().forward(input)
        if input.is_nested:
            return self._on_values(input)
        with frame_of(self, adoption):
            return self._rows(input, adoption.ring)


class RotatedEmbeddingBag(_Rows):
    """An adopted ``nn.EmbeddingBag``: ids ``[B, L]``, or ``[T]`` and offsets, to ``[B, columns]``.

    Unlike in ``nn.EmbeddingBag`` the rows of all ids, ``[T, columns]``, exist in between.

    ``scale_grad_by_freq`` does what it is documented to do. The class itself, with one rank, does
    so on CUDA; on the CPU torch divides by the counts of other ids (its issue 190063).
    """

    mode: str
    include_last_offset: bool

    @staticmethod
    def rotation_dim(module: nn.Module, name: str) -> int | None:
        return 0 if _rotates(module, name, nn.EmbeddingBag) else None

    def forward(
        self,
        input: torch.Tensor,
        offsets: torch.Tensor | None = None,
        per_sample_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        adoption = self._adoption
        if adoption is None or adoption.ring.world_size == 1:
            return super().forward(input, offsets, per_sample_weights)
        ids = input.reshape(-1)  # [T]
        positions = torch.arange(ids.numel(), device=ids.device)
        excluded = None
        if self.padding_idx is not None:
            # The padding's row once more at the end: what points there is left out of its bag.
            excluded = ids.numel()
            positions.masked_fill_(ids == self.padding_idx, excluded)
            ids = torch.cat([ids, ids.new_full((1,), self.padding_idx)])
        with frame_of(self, adoption):
            rows = self._rows(ids, adoption.ring)
        return F.embedding_bag(
            positions.view(input.shape),
            rows,
            offsets,
            # Done above, but for what torch refuses.
            scale_grad_by_freq=self.scale_grad_by_freq and self.mode == "max",
            mode=self.mode,
            per_sample_weights=per_sample_weights,
            include_last_offset=self.include_last_offset,
            padding_idx=excluded,
        )


def refuse_max_norm(module: nn.Module, fqn: str) -> None:
    """Raise if ``module`` is an embedding that writes to its weight, ``fqn``, in every forward."""
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
        raise ValueError(
            f"{fqn}: with max_norm={module.max_norm} each forward would renormalise the rows that "
            f"this rank's batch uses, in a copy of its own: Ignore() it in the policy, or "
            f"renormalise the weights outside of forward"
        )


def _rotates(module: nn.Module, name: str, original: type[nn.Module]) -> bool:
    """Not if its gradient is sparse, or if its forward writes to the weight."""
    rotates = rotates_weight(module, name, original)
    return rotates and not module.sparse and module.max_norm is None
