r"""The rotated linear inside a compiled graph.

A graph holds two operators, of the forward and of the backward, which do what ``ops.linear`` does;
shapes and maths are there. Equal blocks of a model share one graph, so a graph must not know which
layer it computes: the layer comes as a number in a tensor, one of the graph's inputs.

What keeps ranks in step: compilers move, merge and drop operators, by sizes that differ between
ranks. Not these. Each writes to an ``Order``, a tensor that all operators of a graph and direction
share, so that each one follows the one before. And a backward reads the versions that its forward
wrote: where a graph computes forwards again (activation checkpointing), all of them come first.

The gradient of a weight does not pass through the graph. It goes to ``.grad`` (see ``gradient``),
or waits in the layer for a node outside of the graph, from which hooks and the like take it. An
empty tensor, the token, comes from that node and stands in for the weight as the graph's input.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch.distributed.tensor import DTensor

from rtp_wrap.engine import Function, at_its_end, running_backward
from rtp_wrap.gradient import Gradient, accumulates
from rtp_wrap.ops.linear import check_features, flat, layout_of, linear_backward, linear_forward
from rtp_wrap.ops.rotate import autocast_dtype, check_dtype, without_autocast
from rtp_wrap.ring import Ring
from rtp_wrap.shard import dtensor_like
from rtp_wrap.written import WriteCheck

_numbers = itertools.count()
_layers: WeakValueDictionary[int, CapturedLinear] = WeakValueDictionary()


class CapturedLinear:
    """A rotated linear layer as operators know it: its module's, as long as that has one weight.

    Then that of forwards whose backward is to come: the node of the weight keeps it.
    """

    def __init__(self, ring: Ring, fqn: str, transposed: bool) -> None:
        self.ring, self.fqn, self.transposed = ring, fqn, transposed
        number = next(_numbers)
        with torch.inference_mode(False):  # the first call may be in it, others will not
            self.number = torch.tensor(number, device="cpu")
        self.weight: DTensor | None = None
        self._order: Order | None = None
        #: Autograd's node that adds to the weight's ``.grad``.
        self._accumulator: Any = None
        #: What operators have found, for the nodes of all calls, by backward: hooks can run one
        #: within one.
        self.pending: dict[int, list[Gradient]] = {}
        _layers[number] = self

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of the module is another layer."""
        return CapturedLinear, (self.ring, self.fqn, self.transposed)

    def is_of(self, weight: DTensor) -> bool:
        """Whether it can be the layer of a call with ``weight``."""
        return self.weight is None or self.weight is weight

    def inputs(self, weight: DTensor, order: Order) -> LinearInputs:
        """What one call of the layer is in a graph; made outside of it."""
        self.weight, self._order = weight, order
        if running_backward() == -1:
            self.pending.clear()  # of backwards that raised
        token = None
        if torch.is_grad_enabled() and weight.requires_grad:
            token = _CapturedWeight.apply(weight, self)
            self._accumulator = token.grad_fn.next_functions[0][0]
        features = weight.shape[1 if self.transposed else 0]
        dtype = self.ring.precision.compute_dtype(weight.dtype)
        return LinearInputs(self.number, token, features, dtype, order)

    def begin_forward(self) -> DTensor:
        """The weight, for an operator that begins."""
        assert self.weight is not None
        assert self._order is not None
        self._order.provide()
        return self.weight

    def put(self, gradient: Gradient) -> None:
        """A gradient of the weight was found: it goes to ``.grad``, or waits for the node."""
        assert self.weight is not None
        if accumulates(self.weight, self._accumulator, gradient):
            return
        backward = running_backward()
        if backward not in self.pending:
            self.pending[backward] = []

            def drop() -> None:
                """Nobody takes it in torch.autograd.grad() of an input alone, say."""
                for each in self.pending.pop(backward, ()):
                    each.wait()  # as a graph that is being captured would have to

            at_its_end(drop)
        self.pending[backward].append(gradient)

    def take(self) -> DTensor | None:
        """The sum of what was found in this backward and is not in ``.grad``."""
        gradients = self.pending.pop(running_backward(), None)
        if not gradients:
            return None
        first, *others = [gradient.wait() for gradient in gradients]
        if not others:
            return first
        total = first._local_tensor
        for other in others:
            total = total + other._local_tensor
        return dtensor_like(total, first)


class Order:
    """What the operators of one call of a compiled module write to, 0-dimensional each.

    That of the backward is saved for it, and nothing else may write to it until then. Where a
    module is more than one graph, each has its own: the forward of one provides that of the next.
    """

    __slots__ = ("backward", "forward")

    def __init__(self) -> None:
        self.forward = torch.zeros((), device="cpu")
        self.provide()

    def provide(self) -> None:
        """Another one for the backward of what comes next."""
        self.backward = torch.zeros((), device="cpu")


class LinearInputs(NamedTuple):
    """One call of a layer. ``features`` are those of the output."""

    layer: torch.Tensor
    token: torch.Tensor | None
    features: int
    dtype: torch.dtype
    order: Order


class _CapturedWeight(Function):
    """The weight's node, of one call of a compiled module, however often the layer is in there."""

    @staticmethod
    def forward(ctx: Any, weight: DTensor, layer: CapturedLinear) -> torch.Tensor:
        # Also found where an operator compares versions, unless the forward was computed again
        # for the backward, and after the write.
        ctx.its = layer, WriteCheck(weight, layer.fqn, layer.ring)
        return torch.empty(0, dtype=torch.float32, device=layer.ring.device)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[DTensor | None, None]:
        layer, written = ctx.its
        written.check()
        return layer.take(), None


def captured_linear(
    x: torch.Tensor, bias: torch.Tensor | None, inputs: LinearInputs
) -> torch.Tensor:
    """``x @ weight^T + bias`` inside a graph; like ``rotated_linear``.

    ``ValueError`` and ``TypeError`` for shapes and dtypes come when the graph runs, before any
    communication.
    """
    cast = autocast_dtype([x])
    dtype = inputs.dtype if cast is None else cast
    x = x if cast is None else x.to(cast)
    y: torch.Tensor = _CapturedLinear.apply(
        x,
        None if bias is None else bias.to(dtype),
        inputs.token,
        inputs.layer,
        inputs.order.forward,
        inputs.order.backward,
        inputs.features,
        dtype,
    )
    return y


class _CapturedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        token: torch.Tensor | None,
        layer: torch.Tensor,
        forward_order: torch.Tensor,
        backward_order: torch.Tensor,
        features: int,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        y, versions = torch.ops.rtp_wrap.linear_forward(
            x, bias, layer, forward_order, features, dtype
        )
        ctx.needs_dx, ctx.needs_db, ctx.needs_dw = ctx.needs_input_grad[:3]
        ctx.features = x.shape[-1]
        ctx.save_for_backward(x if ctx.needs_dw else None, layer, versions, backward_order)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, layer, versions, order = ctx.saved_tensors
        dx = torch.ops.rtp_wrap.linear_backward(
            dy, x, layer, versions, order, ctx.features, ctx.needs_dx
        )
        db = flat(dy).sum(0) if ctx.needs_db else None
        token_gradient = dy.new_empty(0, dtype=torch.float32) if ctx.needs_dw else None
        return dx if ctx.needs_dx else None, db, token_gradient, None, None, None, None, None


# Defined and not a ``custom_op``, of which each call takes the host longer: those are prepared for
# autograd, which meets the function above instead.
def _define(name: str, schema: str) -> None:
    # A replay would run none of the host's part: what follows streams, versions and other ranks.
    torch.library.define(name, schema, tags=(torch.Tag.cudagraph_unsafe,))


_define(
    "rtp_wrap::linear_forward",
    "(Tensor x, Tensor? bias, Tensor layer, Tensor(a!) order, SymInt features, "
    "ScalarType dtype) -> (Tensor, Tensor)",
)
_define(
    "rtp_wrap::linear_backward",
    "(Tensor dy, Tensor? x, Tensor layer, Tensor versions, Tensor(a!) order, "
    "SymInt features, bool needs_dx) -> Tensor",
)


@torch.library.impl("rtp_wrap::linear_forward", "default")
def _forward(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    layer: torch.Tensor,
    order: torch.Tensor,
    features: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``y``, and the versions of the weight that it was computed with."""
    its = _layer(layer)
    weight = its.begin_forward()
    check_features(its.fqn, x, weight, its.transposed)
    check_dtype(its.fqn, x, dtype)
    versions = WriteCheck(weight, its.fqn, its.ring).versions
    layout = layout_of(its.transposed, (features,))
    with torch.no_grad(), without_autocast(x.device.type):
        (y,) = linear_forward(its.ring, its.fqn, layout, [x], weight, bias)
    return y, torch.tensor(versions, device="cpu")


@torch.library.register_fake("rtp_wrap::linear_forward")
def _(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    layer: torch.Tensor,
    order: torch.Tensor,
    features: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    versions = torch.empty(2, dtype=torch.int64, device="cpu")
    return x.new_empty(*x.shape[:-1], features), versions


@torch.library.impl("rtp_wrap::linear_backward", "default")
def _backward(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    layer: torch.Tensor,
    versions: torch.Tensor,
    order: torch.Tensor,
    features: int,
    needs_dx: bool,
) -> torch.Tensor:
    """``dx``, of ``features``, or empty; the layer is given ``dW`` if there is ``x``."""
    its = _layer(layer)
    weight = its.weight
    assert weight is not None
    WriteCheck(weight, its.fqn, its.ring, tuple(versions.tolist())).check()
    layout = layout_of(its.transposed, (dy.shape[-1],))
    xs = None if x is None else [x]
    with torch.no_grad(), without_autocast(dy.device.type):
        (dx,), dw = linear_backward(its.ring, its.fqn, layout, xs, [dy], weight, [needs_dx])
    if dw is not None:
        its.put(dw)
    return dy.new_empty(0) if dx is None else dx


@torch.library.register_fake("rtp_wrap::linear_backward")
def _(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    layer: torch.Tensor,
    versions: torch.Tensor,
    order: torch.Tensor,
    features: int,
    needs_dx: bool,
) -> torch.Tensor:
    return dy.new_empty(*dy.shape[:-1], features) if needs_dx else dy.new_empty(0)


def _layer(number: torch.Tensor) -> CapturedLinear:
    layer = _layers.get(int(number))
    if layer is None:
        raise RuntimeError(
            "a compiled module ran, or its backward, when the wrapped model that it is part of "
            "was gone already, or its frozen weights were others: keep them until the backward is "
            "done"
        )
    return layer
