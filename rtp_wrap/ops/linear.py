r"""Linear over a rotating weight.

Shapes, for ``T`` tokens of this rank, ``I`` input and ``O`` output features, ``N`` ranks:

    x  [T, I]      input, this rank's own tokens      dy [T, O]
    W  [O, I]      weight; this rank holds W_r, its rows (dim 0) or columns (dim 1)
    b  [O]         bias, whole                        y  [T, O]

The weight is a set of tiles ``W[R, C]`` (rows ``R``, columns ``C``; see ``shard``), each of which
passes every rank once in forward and once in backward:

    forward    y[:, R] (+)= x[:, C] @ W[R, C]^T (+ b[R])
    dgrad      dx[:, C] (+)= dy[:, R] @ W[R, C]
    wgrad      dW[R, C] = 1/N * sum over ranks k of dy_k[:, R]^T @ x_k[:, C]
    dbias      db = sum over T of dy                  averaged by whoever owns the bias

Sharded along dim 0, a tile has all columns, so each output element is one full-length dot product,
and dgrad sums over tiles; along dim 1 it is the other way round. Sums over tiles happen in the
GEMM's epilogue (beta = 1) in the dtype of the result.

A weight may be stored as ``[I, O]``: the same with rows and columns exchanged. And it may be a
stack of projections, each with an input of its own (attention's q, k and v): ``W`` is cut along
``O`` into sections, ``y_s = x_s @ W_s^T + b_s``, and a tile serves each section that it overlaps.

dtypes: GEMMs run in x's dtype, which is the weight's own, the ring's ``param_dtype``, or
autocast's; tiles travel in it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.distributed.tensor import DTensor
from torch.nn import functional

from rtp_wrap.double_backward import refuse_double_backward
from rtp_wrap.engine import Function
from rtp_wrap.gradient import Gradient, deliver
from rtp_wrap.ops.products import add_scaled
from rtp_wrap.ops.rotate import in_layers_dtype, rotate_backward, rotate_forward, without_autocast
from rtp_wrap.ring import Ring
from rtp_wrap.shard import Tile
from rtp_wrap.written import WriteCheck


def rotated_linear(
    x: torch.Tensor,
    weight: DTensor,
    bias: torch.Tensor | None,
    ring: Ring,
    fqn: str,
    *,
    transposed: bool = False,
) -> torch.Tensor:
    """``x @ weight^T + bias`` for a weight whose shards stay at home and rotate as tiles.

    ``x`` is ``[..., I]``, this rank's own; ``weight`` a DTensor ``[O, I]`` (``[I, O]`` if
    ``transposed``), ``Shard(0)`` or ``Shard(1)`` over the ring; ``bias`` a plain ``[O]`` or
    ``None``; ``fqn`` names the layer in errors. Returns ``[..., O]`` in the dtype of the GEMM. All
    ranks of the ring must call it together. The gradient of ``weight`` is averaged over ranks and
    sharded like it; that of ``bias`` is this rank's own.

    Raises ``ValueError`` or ``TypeError`` for shapes or dtypes that do not match, before any
    communication.
    """
    (y,) = _rotated(
        [x], [weight.shape[1 if transposed else 0]], weight, bias, ring, fqn, transposed
    )
    return y


def rotated_projections(
    xs: Sequence[torch.Tensor],
    sizes: Sequence[int],
    weight: DTensor,
    bias: torch.Tensor | None,
    ring: Ring,
    fqn: str,
) -> tuple[torch.Tensor, ...]:
    """``xs[s] @ weight[section s]^T + bias[section s]`` for each section, in one rotation.

    Sections are consecutive rows of ``weight`` ``[O, I]``, ``sizes[s]`` each, ``O`` together; the
    inputs are ``[..., I]`` each. Everything else is as for ``rotated_linear``.
    """
    assert sum(sizes) == weight.shape[0]
    return _rotated(xs, sizes, weight, bias, ring, fqn, False)


def _rotated(
    xs: Sequence[torch.Tensor],
    sizes: Sequence[int],
    weight: DTensor,
    bias: torch.Tensor | None,
    ring: Ring,
    fqn: str,
    transposed: bool,
) -> tuple[torch.Tensor, ...]:
    for x in xs:
        check_features(fqn, x, weight, transposed)
    xs = in_layers_dtype(ring, fqn, weight, xs)
    bias = None if bias is None else bias.to(xs[0].dtype)
    site = _Site(ring, fqn, layout_of(transposed, tuple(sizes)))
    ys: tuple[torch.Tensor, ...] = _RotatedLinear.apply(weight, bias, site, *xs)
    return ys


def check_features(fqn: str, x: torch.Tensor, weight: DTensor, transposed: bool) -> None:
    """Raise ``ValueError`` if ``x`` is no ``[..., I]``."""
    features = weight.shape[0 if transposed else 1]
    if x.dim() == 0 or x.shape[-1] != features:
        raise ValueError(
            f"{fqn}: input of shape {tuple(x.shape)} does not end in the layer's {features} "
            f"input features"
        )


class _Site(NamedTuple):
    """What a rotation needs to know; together, as autograd looks at each argument of a function."""

    ring: Ring
    fqn: str
    layout: Layout


class _RotatedLinear(Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: DTensor,
        bias: torch.Tensor | None,
        site: _Site,
        *xs: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(*(xs if ctx.needs_input_grad[0] else ()))
        # Not saved: the home shard is the parameter's own memory, and a change of it between
        # forward and backward is found by its versions, with an error that names the layer.
        ctx.its = site, weight, WriteCheck(weight, site.fqn, site.ring)
        with without_autocast(xs[0].device.type):
            return linear_forward(*site, xs, weight, bias)

    @staticmethod
    def backward(ctx: Any, *dys: torch.Tensor) -> tuple[Any, ...]:
        site: _Site
        site, weight, written = ctx.its
        refuse_double_backward(site.fqn)
        written.check()
        needs_dw, needs_db, _, *needs_dx = ctx.needs_input_grad
        xs = ctx.saved_tensors if needs_dw else None
        with without_autocast(dys[0].device.type):
            dxs, dw = linear_backward(*site, xs, dys, weight, needs_dx)
            db = _concatenated([flat(dy).sum(0) for dy in dys]) if needs_db else None
        return deliver(weight, ctx.next_functions[0][0], dw), db, None, *dxs


class Layout:
    """Which dimension of the weight the outputs are, and how they are cut into sections."""

    def __init__(self, transposed: bool, sizes: Sequence[int]) -> None:
        self.transposed = transposed
        self.sizes = sizes
        self.is_one = len(self.sizes) == 1
        self._starts = [sum(self.sizes[:index]) for index in range(len(self.sizes))]

    def features(self, tile: Tile) -> tuple[slice, slice]:
        """The output and the input features of a tile."""
        return (tile.cols, tile.rows) if self.transposed else (tile.rows, tile.cols)

    def matrix(self, values: torch.Tensor) -> torch.Tensor:
        """A tile's values as ``[out, in]``."""
        return values.t() if self.transposed else values

    def sections(self, outs: slice) -> Iterator[tuple[int, slice, slice]]:
        """For every section that overlaps ``outs``: its index, and where in it and in ``outs``."""
        for index, (start, size) in enumerate(zip(self._starts, self.sizes, strict=True)):
            low, high = max(outs.start, start), min(outs.stop, start + size)
            if low < high:
                yield (
                    index,
                    slice(low - start, high - start),
                    slice(low - outs.start, high - outs.start),
                )


#: Layers have few, and ask for them in every pass.
layout_of = functools.lru_cache(maxsize=1024)(Layout)


def flat(x: torch.Tensor) -> torch.Tensor:
    """``[..., I]`` as ``[T, I]``."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _concatenated(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]


class _Sums:
    """For each of some tensors ``[..., features]`` one with other features, a sum of products."""

    def __init__(self, likes: Sequence[torch.Tensor], features: Sequence[int]) -> None:
        self._likes, self._features = likes, features
        self.wholes: list[torch.Tensor | None] = [None] * len(likes)
        self._begun: set[tuple[int, int]] = set()

    def begin(self, index: int) -> torch.Tensor:
        """One, as ``[T, features]``, to be written to."""
        whole = self.wholes[index]
        if whole is None:
            like = self._likes[index]
            whole = like.new_empty(*like.shape[:-1], self._features[index])
            self.wholes[index] = whole
        return flat(whole)

    def add(
        self,
        index: int,
        columns: slice,
        start: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
    ) -> None:
        """Add ``a @ b`` in ``columns``, to ``start`` where there is nothing yet."""
        out = self.begin(index)[:, columns]
        key = index, columns.start
        _add_product(out if key in self._begun else start, a, b, out=out)
        self._begun.add(key)

    def of_all(self) -> tuple[torch.Tensor, ...]:
        return tuple(whole for whole in self.wholes if whole is not None)


def linear_forward(
    ring: Ring,
    fqn: str,
    layout: Layout,
    xs: Sequence[torch.Tensor],
    weight: DTensor,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """``y`` ``[..., O_s]`` of each section, of ``x`` ``[..., I]``.

    They are no views, which autograd would not let anybody change in place.
    """
    ys = _Sums(xs, layout.sizes)

    def product(tile: Tile, values: torch.Tensor) -> None:
        matrix = layout.matrix(values)
        if layout.is_one and tile.shape == weight.shape:
            if bias is None or xs[0].dim() == 2:
                ys.wholes[0] = functional.linear(xs[0], matrix, bias)
            else:  # torch's result is a view
                _add_product(bias, flat(xs[0]), matrix.t(), out=ys.begin(0))
            return
        outs, ins = layout.features(tile)
        for index, section, part in layout.sections(outs):
            first = None if bias is None else bias[outs][part]
            ys.add(index, section, first, flat(xs[index])[:, ins], matrix[part].t())

    rotate_forward(ring, fqn, weight, xs[0].dtype, product)
    return ys.of_all()


def linear_backward(
    ring: Ring,
    fqn: str,
    layout: Layout,
    xs: Sequence[torch.Tensor] | None,
    dys: Sequence[torch.Tensor],
    weight: DTensor,
    needs_dx: Sequence[bool],
) -> tuple[tuple[torch.Tensor | None, ...], Gradient | None]:
    """``dx`` of each input that needs it, and ``dW`` if there are ``xs`` to make it of.

    Inputs and gradients are ``[..., I]`` and ``[..., O_s]``.
    """
    features = weight.shape[0 if layout.transposed else 1]
    dys = [dy.contiguous() for dy in dys]  # now, and not once for each product
    dxs = _Sums(dys, [features] * len(dys))

    def dgrad(tile: Tile, values: torch.Tensor) -> None:
        matrix = layout.matrix(values)
        if layout.is_one and tile.shape == weight.shape:
            dxs.wholes[0] = torch.matmul(dys[0], matrix)
            return
        outs, ins = layout.features(tile)
        for index, section, part in layout.sections(outs):
            if needs_dx[index]:
                dxs.add(index, ins, None, flat(dys[index])[:, section], matrix[part])

    def wgrad(tile: Tile, start: torch.Tensor | None, out: torch.Tensor, scale: float) -> None:
        assert xs is not None
        if layout.is_one and tile.shape == weight.shape:
            a, b = (xs[0], dys[0]) if layout.transposed else (dys[0], xs[0])
            _add_product(start, flat(a).t(), flat(b), out=out, scale=scale)
            return
        outs, ins = layout.features(tile)
        for index, section, part in layout.sections(outs):
            dy, x = flat(dys[index])[:, section], flat(xs[index])[:, ins]
            if layout.transposed:
                first = None if start is None else start[:, part]
                _add_product(first, x.t(), dy, out=out[:, part], scale=scale)
            else:
                first = None if start is None else start[part]
                _add_product(first, dy.t(), x, out=out[part], scale=scale)

    dw = rotate_backward(
        ring,
        fqn,
        weight,
        dys[0].dtype,
        dgrad if any(needs_dx) else None,
        wgrad if xs is not None else None,
    )
    return tuple(dxs.wholes), dw


def _add_product(
    start: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    out: torch.Tensor,
    scale: float = 1.0,
) -> None:
    """``out = start + scale * (a @ b)`` in one GEMM; ``start`` may be ``out`` itself.

    ``out`` may be wider than ``a`` and ``b`` (an fp32 accumulator of bf16 products): then the
    product is added in ``out``'s precision.
    """
    # beta = 0 means that start is not read.
    given, beta = (out, 0) if start is None else (start, 1)
    if out.dtype == a.dtype and start is None and scale == 1:
        torch.mm(a, b, out=out)  # takes the host less time
    elif out.dtype == a.dtype:
        torch.addmm(given, a, b, beta=beta, alpha=scale, out=out)
    elif a.is_cuda and a.itemsize == 2 and out.dtype == torch.float32:
        torch.addmm(given, a, b, out_dtype=out.dtype, beta=beta, alpha=scale, out=out)
    else:  # there is no GEMM of these dtypes with this result
        add_scaled(start, torch.mm(a, b), scale, out=out)
