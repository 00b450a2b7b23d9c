"""``nn.MultiheadAttention`` with rotating projections."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import nn

from rtp_wrap.attend import additive, append_token, attend
from rtp_wrap.modules.adoption import Adoption
from rtp_wrap.modules.frame import frame_of
from rtp_wrap.modules.rotated import Rotated, keeps, may_rotate
from rtp_wrap.ops import rotated_linear, rotated_projections
from rtp_wrap.policy import Rotate

_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


class RotatedMultiheadAttention(Rotated):
    """An adopted ``nn.MultiheadAttention``: every rank attends with all heads over its own tokens.

    The weights of the projections into it rotate: the packed one of q, k and v in one rotation,
    separate ones in a rotation each. ``out_proj`` is a layer of its own; where its weight rotates,
    it is called as a module. Weights that do not rotate are used as torch does.
    """

    embed_dim: int
    kdim: int
    vdim: int
    num_heads: int
    head_dim: int
    dropout: float
    batch_first: bool
    add_zero_attn: bool
    training: bool
    in_proj_weight: torch.Tensor
    in_proj_bias: torch.Tensor | None
    bias_k: torch.Tensor | None
    bias_v: torch.Tensor | None
    out_proj: nn.Linear
    _qkv_same_embed_dim: bool

    @staticmethod
    def rotation_dim(module: nn.Module, name: str) -> int | None:
        rotates = (
            name in _PROJECTIONS and can_rotate(module) and may_rotate(module._parameters.get(name))
        )
        return 0 if rotates else None

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        adoption = self._adoption
        if adoption is None or adoption.ring.world_size == 1:
            return super().forward(
                query,
                key,
                value,
                key_padding_mask,
                need_weights,
                attn_mask,
                average_attn_weights,
                is_causal,
            )
        if is_causal and attn_mask is None:
            raise RuntimeError(
                f"{self.site}: is_causal says that attn_mask is causal, and there is none: give "
                f"it too, for example nn.Transformer.generate_square_subsequent_mask(length)"
            )
        is_causal = is_causal and key_padding_mask is None and not need_weights
        if is_causal:
            attn_mask = None  # the hint says it all
        self._check_inputs(query, key, value)
        self._check_masks(query, key, key_padding_mask, attn_mask)
        with frame_of(self, adoption):
            q, k, v = (self._heads(x) for x in self._project(adoption, query, key, value))
            appended = int(self.add_zero_attn)
            if self.bias_k is not None and self.bias_v is not None:
                k, v = append_token(k, self.bias_k), append_token(v, self.bias_v)
                appended += 1
            if self.add_zero_attn:
                k, v = append_token(k, None), append_token(v, None)
            output, weights = attend(
                q,
                k,
                v,
                self._merged(key_padding_mask, attn_mask, q, appended),
                dropout=self.dropout if self.training else 0.0,
                is_causal=is_causal,
                need_weights=need_weights,
            )
            if weights is not None and average_attn_weights:
                weights = weights.mean(1)
            batched = query.dim() == 3
            if weights is not None and not batched:
                weights = weights.squeeze(0)
            return self._project_out(output, batched), weights

    def _project(
        self, adoption: Adoption, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> list[torch.Tensor]:
        """q, k and v, of the shapes of the inputs but for ``embed_dim`` features each."""
        width, bias = self.embed_dim, self.in_proj_bias
        if not self._qkv_same_embed_dim:
            biases = [None] * 3 if bias is None else bias.split(width)
            inputs = zip("qkv", (query, key, value), biases, strict=True)
            return [self._project_one(adoption, f"{n}_proj_weight", x, b) for n, x, b in inputs]
        # Projections of one input are one product.
        xs, sizes = [query, key, value], [width] * 3
        if key is value:
            xs, sizes = [query, key], [width, 2 * width]
            if query is key:
                xs, sizes = [query], [3 * width]
        if self._rotates("in_proj_weight", adoption):
            ring, weight = adoption.ring, self.home("in_proj_weight")
            ys = rotated_projections(xs, sizes, weight, bias, ring, self.site)
        else:
            weights = self.in_proj_weight.split(sizes)
            biases = [None] * len(sizes) if bias is None else bias.split(sizes)
            ys = tuple(map(F.linear, xs, weights, biases))
        return [part for y in ys for part in y.split(width, -1)]

    def _project_one(
        self, adoption: Adoption, name: str, x: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        if self._rotates(name, adoption):
            ring = adoption.ring
            return rotated_linear(x, self.home(name), bias, ring, f"{self.site}.{name}")
        return F.linear(x, getattr(self, name), bias)

    def _project_out(self, output: torch.Tensor, batched: bool) -> torch.Tensor:
        """``[B, H, L, D]`` to the shape of the query."""
        batch_first = self.batch_first or not batched
        output = output.transpose(1, 2) if batch_first else output.permute(2, 0, 1, 3)
        output = output.flatten(2)  # [B, L, E] or [L, B, E]
        if isinstance(self.out_proj, Rotated):
            output = self.out_proj(output)
        else:  # whatever else it is, torch only reads its parameters
            output = F.linear(output, self.out_proj.weight, self.out_proj.bias)
        if not batched:
            return output.squeeze(0)
        if self.batch_first:
            # With the strides that torch's has: with one seed, a dropout after it then draws the
            # same for each element.
            return output.transpose(0, 1).contiguous().transpose(0, 1)
        return output

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, L, E]``, ``[L, B, E]`` or, of one sample, ``[L, E]`` as ``[B, H, L, D]``."""
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        if x.dim() == 3:
            return x.transpose(0, 1).unsqueeze(0)
        return x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3)

    def _merged(
        self,
        key_padding_mask: torch.Tensor | None,
        attn_mask: torch.Tensor | None,
        q: torch.Tensor,
        appended: int,
    ) -> torch.Tensor | None:
        """One mask of what there is, to be added to the scores; appended tokens are not masked."""
        merged = None
        samples, heads, length, _ = q.shape
        if attn_mask is not None:
            shape = (1, 1) if attn_mask.dim() == 2 else (samples, heads)
            merged = additive(attn_mask, q.dtype).view(*shape, length, attn_mask.shape[-1])
        if key_padding_mask is not None:
            padding = additive(key_padding_mask, q.dtype)
            padding = padding.view(samples, 1, 1, padding.shape[-1])
            merged = padding if merged is None else merged + padding
        return merged if merged is None or not appended else F.pad(merged, (0, appended))

    def _rotates(self, name: str, adoption: Adoption) -> bool:
        return isinstance(adoption.strategies.get(name), Rotate)

    def _check_inputs(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        inputs = {"query": query, "key": key, "value": value}
        if any(x.is_nested for x in inputs.values()):
            raise TypeError(
                f"{self.site}: rotated attention does not take nested tensors: give padded ones "
                f"and a key_padding_mask, or Gather() this layer"
            )
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in inputs.items())
        if query.dim() not in (2, 3) or not query.dim() == key.dim() == value.dim():
            raise ValueError(
                f"{self.site}: {shapes}: give three dimensions each, or two without a batch"
            )
        features = (self.embed_dim, self.kdim, self.vdim)
        if tuple(x.shape[-1] for x in inputs.values()) != features:
            raise ValueError(f"{self.site}: {shapes} do not end in the layer's {features} features")
        if _sizes(query, self.batch_first)[0] != _sizes(key, self.batch_first)[0] or (
            key.shape[:-1] != value.shape[:-1]
        ):
            raise ValueError(
                f"{self.site}: {shapes}: of one batch, with as many keys as values? (the layer has "
                f"batch_first={self.batch_first})"
            )

    def _check_masks(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        key_padding_mask: torch.Tensor | None,
        attn_mask: torch.Tensor | None,
    ) -> None:
        samples, length = _sizes(query, self.batch_first)
        _, source = _sizes(key, self.batch_first)
        padding = (samples, source) if query.dim() == 3 else (source,)
        self._check_mask("key_padding_mask", key_padding_mask, padding)
        each_alike, each_own = (length, source), (samples * self.num_heads, length, source)
        self._check_mask("attn_mask", attn_mask, each_alike, each_own)
        masks = (key_padding_mask, attn_mask)
        if len({mask.dtype for mask in masks if mask is not None}) > 1:
            warnings.warn(
                f"{self.site}: key_padding_mask and attn_mask are of different types, which torch "
                f"deprecates",
                stacklevel=2,
            )

    def _check_mask(self, name: str, mask: torch.Tensor | None, *shapes: tuple[int, ...]) -> None:
        if mask is None:
            return
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise TypeError(f"{self.site}: {name} is {mask.dtype}: give a bool or a float mask")
        if tuple(mask.shape) not in shapes:
            raise ValueError(
                f"{self.site}: {name} has the shape {tuple(mask.shape)}, but should have "
                f"{' or '.join(map(str, shapes))}"
            )


def can_rotate(module: nn.Module) -> bool:
    """Whether ``module`` is attention whose forward the rotated form can replace."""
    return keeps(module, nn.MultiheadAttention, "forward")


def _sizes(x: torch.Tensor, batch_first: bool) -> tuple[int, int]:
    """How many samples, and how many tokens each has."""
    if x.dim() == 2:
        return 1, x.shape[0]
    return (x.shape[0], x.shape[1]) if batch_first else (x.shape[1], x.shape[0])
