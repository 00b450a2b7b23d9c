r"""Convolutions over a rotating weight, transposed ones too.

Shapes, for ``B`` samples of this rank, ``I`` input and ``O`` output channels in ``g`` groups, a
kernel of sizes ``*k``, inputs of sizes ``*s`` and outputs of ``*t``, ``N`` ranks:

    x  [B, I, *s]    input, this rank's own samples     dy [B, O, *t]
    W  [O, I/g, *k]  weight ([I, O/g, *k] if transposed); this rank holds its rows (dim 0) or its
                     columns (dim 1)
    b  [O]           bias, whole                         y  [B, O, *t]

The weight is a set of tiles ``W[R, C]`` (rows ``R``, columns ``C``, kernels whole; see ``shard``),
each of which passes every rank once in forward and once in backward:

    forward    y[:, outs] (+)= conv(x[:, ins], W[R, C]) (+ b[outs])
    dgrad      dx[:, ins] (+)= conv's gradient of its input, of dy[:, outs] and W[R, C]
    wgrad      dW[R, C] = 1/N * sum over ranks of conv's gradient of its weight, of x_k[:, ins]
               and dy_k[:, outs]
    dbias      db = sum over B and *t of dy              averaged by whoever owns the bias

``outs`` are the channels that the rows count, ``ins`` those that the columns count, in every group
of theirs; of a transposed convolution it is the other way round. The rows of a tile may begin and
end inside a group: they are part of a group, then whole groups, then part of a group again, and
each of these (at most three) is a convolution of its own.

Sharded along the dim of the output channels, each output element is one whole sum, and dgrad sums
over tiles; along the other dim it is the other way round. Sums over tiles are in the dtype of the
result.

dtypes: convolutions run in x's dtype, which is the weight's own, the ring's ``param_dtype``, or
autocast's; tiles travel in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from rtp_wrap.double_backward import refuse_double_backward
from rtp_wrap.engine import Function
from rtp_wrap.gradient import Gradient, deliver
from rtp_wrap.ops.products import add_scaled
from rtp_wrap.ops.rotate import in_layers_dtype, rotate_backward, rotate_forward, without_autocast
from rtp_wrap.ring import Ring
from rtp_wrap.shard import Tile
from rtp_wrap.written import WriteCheck

#: One number for all spatial dimensions, or one for each.
Sizes = int | Sequence[int]


def rotated_conv(
    x: torch.Tensor,
    weight: DTensor,
    bias: torch.Tensor | None,
    ring: Ring,
    fqn: str,
    *,
    stride: Sizes = 1,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    transposed: bool = False,
    output_padding: Sizes = 0,
    groups: int = 1,
) -> torch.Tensor:
    """The convolution of ``x`` with a weight whose shards stay at home and rotate as tiles.

    ``x`` is ``[B, I, *s]`` or, unbatched, ``[I, *s]``, this rank's own; ``weight`` a DTensor
    ``[O, I/groups, *k]`` (``[I, O/groups, *k]`` if ``transposed``), ``Shard(0)`` or ``Shard(1)``
    over the ring; ``bias`` a plain ``[O]`` or ``None``; ``fqn`` names the layer in errors; the rest
    is as for ``torch.convolution``. Returns ``[B, O, *t]`` or ``[O, *t]``. All ranks of the ring
    must call it together. The gradient of ``weight`` is averaged over ranks and sharded like it;
    that of ``bias`` is this rank's own.

    Raises ``ValueError`` or ``TypeError`` for shapes or dtypes that do not match, before any
    communication.
    """
    spatial = weight.dim() - 2
    layout = _Layout(
        _of_each(stride, spatial),
        _of_each(padding, spatial),
        _of_each(dilation, spatial),
        transposed,
        _of_each(output_padding, spatial),
        groups,
        tuple(weight.shape),
    )
    _check_shape(x, layout, fqn)
    (x,) = in_layers_dtype(ring, fqn, weight, [x])
    bias = None if bias is None else bias.to(x.dtype)
    batched = x if x.dim() == spatial + 2 else x.unsqueeze(0)
    y: torch.Tensor = _RotatedConv.apply(weight, bias, batched, ring, fqn, layout)
    return y if batched is x else y.squeeze(0)


def _of_each(sizes: Sizes, spatial: int) -> tuple[int, ...]:
    """One number per spatial dimension, as torch reads a number or a tuple of one."""
    given = (sizes,) if isinstance(sizes, int) else tuple(sizes)
    return given * spatial if len(given) == 1 else given


def _check_shape(x: torch.Tensor, layout: _Layout, fqn: str) -> None:
    channels, spatial = layout.channels(by_rows=layout.transposed), len(layout.kernel)
    if x.dim() not in (spatial + 1, spatial + 2) or x.shape[-spatial - 1] != channels:
        raise ValueError(
            f"{fqn}: input of shape {tuple(x.shape)} is neither [batch, {channels} input channels, "
            f"{spatial} spatial dimensions] nor that without the batch"
        )
    sizes = tuple(x.shape[-spatial:])
    outputs = layout.output_sizes(sizes)
    if min(sizes) < 1 or min(outputs) < (0 if layout.transposed else 1):
        raise ValueError(
            f"{fqn}: input of shape {tuple(x.shape)} is too small for a kernel of {layout.kernel} "
            f"with padding {layout.padding} and dilation {layout.dilation}: the output would be of "
            f"size {outputs}"
        )


class _RotatedConv(Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: DTensor,
        bias: torch.Tensor | None,
        x: torch.Tensor,
        ring: Ring,
        fqn: str,
        layout: _Layout,
    ) -> torch.Tensor:
        ctx.save_for_backward(*((x,) if ctx.needs_input_grad[0] else ()))
        ctx.shape, ctx.memory_format = x.shape, _memory_format(x)
        # Not saved: the home shard is the parameter's own memory, and a change of it between
        # forward and backward is found by its versions, with an error that names the layer.
        ctx.weight, ctx.written = weight, WriteCheck(weight, fqn, ring)
        ctx.ring, ctx.fqn, ctx.layout = ring, fqn, layout
        with without_autocast(x.device.type):
            return _forward(ring, fqn, layout, x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        refuse_double_backward(ctx.fqn)
        ctx.written.check()
        needs_dw, needs_db, needs_dx = ctx.needs_input_grad[:3]
        (x,) = ctx.saved_tensors if needs_dw else (None,)
        dx = _empty(ctx.shape, dy, ctx.memory_format) if needs_dx else None
        with without_autocast(dy.device.type):
            dw = _backward(ctx.ring, ctx.fqn, ctx.layout, x, dy, dx, ctx.weight)
            db = dy.sum([0, *range(2, dy.dim())]) if needs_db else None
        return deliver(ctx.weight, ctx.next_functions[0][0], dw), db, dx, None, None, None


def _forward(
    ring: Ring,
    fqn: str,
    layout: _Layout,
    x: torch.Tensor,
    weight: DTensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    shape = (
        x.shape[0],
        layout.channels(by_rows=not layout.transposed),
        *layout.output_sizes(x.shape[2:]),
    )
    y = _empty(shape, x, _memory_format(x))
    begun: set[tuple[int, int]] = set()  # output channels that have a sum already

    def product(tile: Tile, values: torch.Tensor) -> None:
        for part in layout.parts(tile):
            first = _begins(part.key(by_rows=not layout.transposed), begun)
            added = None
            if first and bias is not None:
                added = layout.outs(bias.unsqueeze(0), part).flatten()
            result = layout.convolve(layout.ins(x, part), values[part.own], added, part)
            _put(layout.outs(y, part), result, first)

    rotate_forward(ring, fqn, weight, x.dtype, product)
    return y


def _backward(
    ring: Ring,
    fqn: str,
    layout: _Layout,
    x: torch.Tensor | None,
    dy: torch.Tensor,
    dx: torch.Tensor | None,
    weight: DTensor,
) -> Gradient | None:
    """Fill ``dx``, if there is one; return ``dW`` if there is an ``x`` to make it of."""
    begun: set[tuple[int, int]] = set()  # input channels that have a sum already

    def dgrad(tile: Tile, values: torch.Tensor) -> None:
        assert dx is not None
        for part in layout.parts(tile):
            out = layout.ins(dx, part)
            dy_part = layout.outs(dy, part)
            result = layout.input_gradient(dy_part, out, values[part.own], part)
            _put(out, result, _begins(part.key(by_rows=layout.transposed), begun))

    def wgrad(tile: Tile, start: torch.Tensor | None, out: torch.Tensor, scale: float) -> None:
        assert x is not None
        for part in layout.parts(tile):
            dy_part, x_part = layout.outs(dy, part), layout.ins(x, part)
            result = layout.weight_gradient(dy_part, x_part, part)
            first = None if start is None else start[part.own]
            add_scaled(first, result, scale, out=out[part.own])

    return rotate_backward(
        ring,
        fqn,
        weight,
        dy.dtype,
        dgrad if dx is not None else None,
        wgrad if x is not None else None,
    )


@dataclass(frozen=True, slots=True)
class _Part:
    """Rows of a tile that are part of one group, or whole groups; the tile's columns of them.

    ``own`` are its rows within the tile, ``rows`` within the weight; ``groups`` are theirs.
    """

    own: slice
    rows: slice
    groups: slice
    cols: slice

    @property
    def n(self) -> int:
        """How many groups."""
        return self.groups.stop - self.groups.start

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.stop - self.rows.start, self.cols.stop - self.cols.start

    def key(self, by_rows: bool) -> tuple[int, int]:
        """The same for all parts of one range of channels, which is counted by rows or columns."""
        return (self.rows.start, 0) if by_rows else (self.groups.start, self.cols.start)


@dataclass(frozen=True)
class _Layout:
    """The convolution, and which channels a tile of its weight joins."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int
    weight_shape: tuple[int, ...]

    @property
    def kernel(self) -> tuple[int, ...]:
        return self.weight_shape[2:]

    def channels(self, by_rows: bool) -> int:
        """All channels that the weight's rows count, or its columns in all groups."""
        rows, cols = self.weight_shape[:2]
        return rows if by_rows else self.groups * cols

    def output_sizes(self, sizes: Sequence[int]) -> tuple[int, ...]:
        reach = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel, strict=True)]
        dims = zip(sizes, reach, self.stride, self.padding, self.output_padding, strict=True)
        if self.transposed:
            return tuple((size - 1) * s - 2 * p + r + more for size, r, s, p, more in dims)
        return tuple((size + 2 * p - r) // s + 1 for size, r, s, p, _ in dims)

    def parts(self, tile: Tile) -> Iterator[_Part]:
        """The tile cut where it enters and leaves whole groups."""
        size = self.weight_shape[0] // self.groups  # rows of a group
        row = tile.row
        while row < tile.row_end:
            group = row // size
            if row % size or row + size > tile.row_end:  # part of a group
                count, end = 1, min((group + 1) * size, tile.row_end)
            else:
                count = (tile.row_end - row) // size
                end = row + count * size
            own = slice(row - tile.row, end - tile.row)
            yield _Part(own, slice(row, end), slice(group, group + count), tile.cols)
            row = end

    def ins(self, x: torch.Tensor, part: _Part) -> torch.Tensor:
        """The input channels of a part: a view ``[B, groups, channels, *s]`` of ``x``."""
        return self._select(x, part, by_rows=self.transposed)

    def outs(self, y: torch.Tensor, part: _Part) -> torch.Tensor:
        """The output channels of a part: a view ``[B, groups, channels, *t]`` of ``y``."""
        return self._select(y, part, by_rows=not self.transposed)

    def _select(self, tensor: torch.Tensor, part: _Part, by_rows: bool) -> torch.Tensor:
        if by_rows:
            return tensor[:, part.rows].unflatten(1, (part.n, part.shape[0] // part.n))
        by_group = tensor.unflatten(1, (self.groups, self.weight_shape[1]))
        return by_group[:, part.groups, part.cols]

    def convolve(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, part: _Part
    ) -> torch.Tensor:
        return torch.convolution(
            x.flatten(1, 2),
            weight,
            bias,
            self.stride,
            self.padding,
            self.dilation,
            self.transposed,
            self.output_padding,
            part.n,
        )

    def input_gradient(
        self, dy: torch.Tensor, like: torch.Tensor, weight: torch.Tensor, part: _Part
    ) -> torch.Tensor:
        """The gradient of an input of which ``like`` has the shape and the memory format."""
        return self._gradients(dy, like, weight, part, (True, False, False))[0]

    def weight_gradient(self, dy: torch.Tensor, x: torch.Tensor, part: _Part) -> torch.Tensor:
        # Of the weight its own gradient needs the shape alone.
        weight = x.new_empty(1).expand(*part.shape, *self.kernel)
        return self._gradients(dy, x, weight, part, (False, True, False))[1]

    def _gradients(
        self,
        dy: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        part: _Part,
        wanted: tuple[bool, bool, bool],
    ) -> Any:
        return torch.ops.aten.convolution_backward(
            dy.flatten(1, 2),
            x.flatten(1, 2),
            weight,
            None,
            self.stride,
            self.padding,
            self.dilation,
            self.transposed,
            self.output_padding,
            part.n,
            wanted,
        )


def _begins(key: tuple[int, int], begun: set[tuple[int, int]]) -> bool:
    """Whether nobody has asked for ``key`` before."""
    first = key not in begun
    begun.add(key)
    return first


def _put(out: torch.Tensor, result: torch.Tensor, first: bool) -> None:
    """Write ``result`` to the channels ``out`` if it is their first, else add it."""
    result = result.view(out.shape)
    if first:
        out.copy_(result)
    else:
        out.add_(result)


def _empty(
    shape: Sequence[int], like: torch.Tensor, memory_format: torch.memory_format
) -> torch.Tensor:
    return torch.empty(*shape, dtype=like.dtype, device=like.device, memory_format=memory_format)


def _memory_format(x: torch.Tensor) -> torch.memory_format:
    """``channels_last`` if ``x`` is that and not contiguous as well."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    last = formats.get(x.dim(), torch.contiguous_format)
    keeps = x.is_contiguous(memory_format=last) and not x.is_contiguous()
    return last if keeps else torch.contiguous_format
