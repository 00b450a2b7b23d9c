"""From a model to the ``torch.fx.Graph`` of its sites in execution order, without running it.

``capture`` runs the model's own Python code once, on fake tensors: they have a shape, a dtype and a
device, but no values and no memory. What reaches the dispatcher is recorded, so that control flow,
``*args`` and asserts, on which symbolic tracing fails, are no obstacle; only code that asks for a
tensor's value is. In the graph

    placeholder     an input
    call_module     a site: a call of a module that owns parameters; target is its fqn
    get_attr        a parameter or buffer that is used outside of such a module; target is its fqn
    call_function   an ATen operation between sites
    output          what the model returned

Nodes of tensors have their shape and dtype in ``node.meta["shape"]`` and ``node.meta["dtype"]``,
sites whether an input of theirs requires a gradient in ``node.meta["trains_input"]``. The graph is
for planning; it does not run again, since arguments that are no tensors may be missing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from rtp_wrap.names import own_name, own_names

#: What an ``fx`` argument may be besides nodes and containers of them.
_CONSTANTS = (bool, int, float, complex, str, torch.dtype, torch.device, torch.memory_format)

#: The dtype in which a parameter of a dtype computes in a module.
DtypeOf = Callable[[nn.Module, torch.dtype], torch.dtype]


@dataclass(frozen=True)
class Trace:
    """``graph`` as above, and what else the run showed.

    ``activation_bytes`` is what autograd saved for backward: shared storages once, parameters,
    buffers and inputs not at all. ``opaque`` has the sites whose own code asks for
    values, by fqn, with the error: experts that look at which tokens they get, for example. They
    are taken to return something like their first floating-point input, and to save nothing else.
    """

    graph: fx.Graph
    activation_bytes: int
    opaque: dict[str, str]


def capture(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    before_module: Callable[[Any], Any] = lambda inputs: inputs,
    dtype_of: DtypeOf = lambda module, dtype: dtype,
) -> Trace:
    """Trace ``model(*args, **kwargs)``. Values of tensors are not looked at; meta tensors are fine.

    ``dtype_of`` gives the dtype in which a module's parameter of some dtype computes, and
    ``before_module`` changes the ``(args, kwargs)`` of every module: mixed precision does both. The
    model is as before afterwards. What its code raises on fake tensors, for example where it
    branches on a value outside of a site, is passed on.
    """
    fakes = _Fakes(dtype_of)
    with fakes.in_place_of_parameters(model):
        recorder = _Recorder(model)
        # What is compiled runs as it is: a graph would be made of fakes, and of the recorder.
        uncompiled = torch.compiler.set_stance("force_eager")
        with recorder.watching(before_module), fakes.mode, uncompiled:
            recorder.run(fakes.of((tuple(args), dict(kwargs or {}))))
    _erase_unused(recorder.graph)
    return Trace(recorder.graph, recorder.activation_bytes, recorder.opaque)


def _erase_unused(graph: fx.Graph) -> None:
    """Remove operations whose results nobody reads, such as autograd's own detached copies."""
    for node in reversed(graph.nodes):
        if node.op != "call_function" or node.users:
            continue
        if node.target is _part or not node.target._schema.is_mutable:
            graph.erase_node(node)


class _Fakes:
    """Fake tensors for real ones; the same one for the same one, so that ties stay."""

    def __init__(self, dtype_of: DtypeOf) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._dtype_of = dtype_of
        self._made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # with the real one, kept

    def of(self, values: Any) -> Any:
        return tree_map(lambda v: self._one(v) if isinstance(v, torch.Tensor) else v, values)

    def _one(self, real: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        if id(real) not in self._made:
            dtype = dtype or real.dtype
            # A model on the meta device is planned as one on the CPU, where what its forward
            # creates by itself (positions, masks) will be.
            device = "cpu" if real.is_meta else real.device
            with self.mode:
                fake: torch.Tensor = torch.empty_strided(
                    real.shape, real.stride(), dtype=dtype, device=device
                )
            if isinstance(real, nn.Parameter):
                fake = nn.Parameter(fake, requires_grad=real.requires_grad)
            elif real.requires_grad:
                fake.requires_grad_()
            self._made[id(real)] = real, fake
        return self._made[id(real)][1]

    @contextmanager
    def in_place_of_parameters(self, model: nn.Module) -> Iterator[None]:
        """Parameters and buffers of all modules are fakes inside."""
        real = [(m, dict(m._parameters), dict(m._buffers)) for m in model.modules()]
        try:
            for module, parameters, buffers in real:
                for name, parameter in parameters.items():
                    if parameter is not None:
                        dtype = self._dtype_of(module, parameter.dtype)
                        module._parameters[name] = self._one(parameter, dtype)  # type: ignore[assignment]
                module._buffers.update(self.of(buffers))
            yield
        finally:
            for module, parameters, buffers in real:
                module._parameters.update(parameters)
                module._buffers.update(buffers)


class _Recorder(TorchDispatchMode):
    """Writes the graph while the model runs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.activation_bytes = 0
        self.opaque: dict[str, str] = {}
        self._model = model
        # With the tensors, which are kept: ids are reused.
        self._nodes: dict[int, tuple[torch.Tensor, fx.Node]] = {}
        self._inside: nn.Module | None = None  # the site whose forward runs
        self._fqns = {module: fqn for fqn, module in own_names(model)}
        self._names: dict[int, str] = {}
        self._counted: set[int] = set()  # storages that are no activations, or counted already
        self._saved: list[torch.Tensor] = []  # kept: addresses of storages are reused
        for fqn, tensor in (*model.named_parameters(), *model.named_buffers()):
            self._names[id(tensor)] = own_name(fqn)
            self._counted.add(tensor.untyped_storage()._cdata)

    def run(self, inputs: Any) -> None:
        for index, tensor in enumerate(_tensors(inputs)):
            self._bind(tensor, self.graph.placeholder(f"input_{index}"))
            self._counted.add(tensor.untyped_storage()._cdata)
        args, kwargs = inputs
        with self._saving(), self:
            output = self._model(*args, **kwargs)
        self.graph.output(self.argument(output))

    @contextmanager
    def watching(self, before_module: Callable[[Any], Any]) -> Iterator[None]:
        """Sites are recorded as one node each inside."""
        handles = []

        def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
            changed = before_module((args, kwargs))
            if self._inside is None and is_site(module):
                self._inside = module
                self._entered = self.argument(changed)
                self._trains_input = any(each.requires_grad for each in _tensors(changed))
            return changed

        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if self._inside is module:
                self._inside = None
                arguments, keywords = self._entered
                node = self.graph.call_module(self._fqns[module], arguments, keywords)
                node.meta["trains_input"] = self._trains_input
                self._bind_output(output, node)
                if isinstance(module, nn.RMSNorm) and output.requires_grad:
                    self._count_rms_norm(args[0] if args else kwargs["x"], module)

        def tolerant(forward: Callable[..., Any], fqn: str) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                try:
                    return forward(*args, **kwargs)
                except (DataDependentOutputException, DynamicOutputShapeException) as error:
                    floats = [t for t in _tensors((args, kwargs)) if t.is_floating_point()]
                    if not floats:
                        raise
                    self.opaque[fqn] = f"{type(error).__name__}: {error}".splitlines()[0]
                    return floats[0].clone()

            return call

        sites = {fqn: each for fqn, each in own_names(self._model) if is_site(each)}
        patched = {fqn: vars(each).get("forward") for fqn, each in sites.items()}
        for fqn, site in sites.items():
            vars(site)["forward"] = tolerant(site.forward, fqn)
        for module in self._model.modules():
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(module.register_forward_hook(leave, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for fqn, forward in patched.items():
                if forward is None:
                    del vars(sites[fqn])["forward"]
                else:
                    vars(sites[fqn])["forward"] = forward

    def _saving(self) -> saved_tensors_hooks:
        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if not isinstance(self._inside, nn.RMSNorm):
                self._count(tensor)
            return tensor

        return saved_tensors_hooks(pack, lambda tensor: tensor)

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._counted:
            self._counted.add(storage._cdata)
            self._saved.append(tensor)
            self.activation_bytes += storage.nbytes()

    def _count_rms_norm(self, x: torch.Tensor, norm: nn.RMSNorm) -> None:
        """GPUs have one kernel for it, which saves its input and an fp32 number for each row.

        Fake tensors on the CPU show what a CPU does, which saves several fp32 copies of the input.
        """
        self._count(x)
        self.activation_bytes += 4 * x.numel() // max(1, math.prod(norm.normalized_shape))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if self._inside is None:
            node = self.graph.call_function(
                func, self.argument(tuple(args)), self.argument(kwargs or {})
            )
            self._bind_output(output, node)
        return output

    def argument(self, value: Any) -> Any:
        """``value`` as an argument of a node: tensors as the nodes that made them."""
        if isinstance(value, torch.Tensor):
            return self._node(value)
        if isinstance(value, dict):
            return {str(key): self.argument(each) for key, each in value.items()}
        if isinstance(value, list):
            return [self.argument(each) for each in value]
        if isinstance(value, tuple):
            return tuple(self.argument(each) for each in value)
        return value if isinstance(value, _CONSTANTS) else None

    def _node(self, tensor: torch.Tensor) -> fx.Node:
        if id(tensor) not in self._nodes:
            fqn = self._names.get(id(tensor))
            # A tensor from nowhere is a constant that the model's code keeps.
            made = (
                self.graph.placeholder("constant")
                if fqn is None
                else self.graph.create_node("get_attr", fqn)
            )
            self._bind(tensor, made)
        return self._nodes[id(tensor)][1]

    def _bind(self, tensor: torch.Tensor, node: fx.Node) -> None:
        node.meta["shape"], node.meta["dtype"] = tuple(tensor.shape), tensor.dtype
        self._nodes[id(tensor)] = tensor, node

    def _bind_output(self, output: Any, node: fx.Node) -> None:
        if isinstance(output, torch.Tensor):
            self._bind(output, node)
            return
        for index, tensor in enumerate(_tensors(output)):
            self._bind(tensor, self.graph.call_function(_part, (node, index)))


def _part(output: Any, index: int) -> Any:
    """The tensor with this index among those that a node with several gives."""
    return _tensors(output)[index]


def _tensors(values: Any) -> list[torch.Tensor]:
    """The tensors in containers of any depth, in order."""
    return [each for each in tree_leaves(values) if isinstance(each, torch.Tensor)]


def is_site(module: nn.Module) -> bool:
    """Whether calls of ``module`` are sites: it owns parameters, and no module in it does.

    Attention is one site with its output projection.
    """
    if not any(parameter is not None for parameter in module._parameters.values()):
        return False
    if isinstance(module, nn.MultiheadAttention):
        return True
    return all(next(child.parameters(), None) is None for child in module.children())
