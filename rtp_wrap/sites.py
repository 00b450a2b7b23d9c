"""What the plan takes from a traced graph: order, shared inputs, and fused pairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx, nn


@dataclass(frozen=True)
class Site:
    """One use of sharded weights, by the fqn of the module that is called.

    ``trains_input`` says whether the gradient of its input is needed, ``reads`` names the tensor
    that it takes: sites of equal ``reads`` share an input, and could share what they fetch.
    Where the order was only seen in a forward, ``reads`` is empty and ``trains_input`` assumed.
    """

    fqn: str
    reads: str
    trains_input: bool


@dataclass(frozen=True)
class Pair:
    """Layers whose outputs meet only element by element on the way into one other layer.

    ``y = last(graph(first[0](x), first[1](x), ...))``, as in an MLP, gated or not: a tile of the
    outputs of ``first`` is all that a tile of the inputs of ``last`` needs, so that the hidden
    activation need not exist whole. ``graph`` has a placeholder for each of ``first``.
    """

    first: tuple[str, ...]
    last: str
    graph: fx.Graph


def sites_of(graph: fx.Graph) -> tuple[Site, ...]:
    """The sites in execution order; a module that is called twice is two of them."""
    return tuple(
        Site(str(node.target), _input_of(node), bool(node.meta.get("trains_input")))
        for node in graph.nodes
        if node.op == "call_module"
    )


def outside_uses_of(graph: fx.Graph) -> tuple[str, ...]:
    """Fqns of parameters and buffers that are used outside of the module that has them."""
    return tuple(dict.fromkeys(str(node.target) for node in graph.nodes if node.op == "get_attr"))


def pairs_of(graph: fx.Graph, model: nn.Module) -> tuple[Pair, ...]:
    """All pairs of linear layers with nothing but pointwise operations between them."""

    def is_linear(node: fx.Node) -> bool:
        return node.op == "call_module" and _is_linear(model.get_submodule(str(node.target)))

    found = []
    for node in graph.nodes:
        if is_linear(node) and len(node.all_input_nodes) == 1:
            pair = _pair_into(node, is_linear)
            if pair is not None:
                found.append(pair)
    return tuple(found)


def _is_linear(module: nn.Module) -> bool:
    # Hugging Face's Conv1D is one by its weight's and bias' shapes; nn.Linear says so itself.
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _pair_into(last: fx.Node, is_linear: Callable[[fx.Node], bool]) -> Pair | None:
    """Walk up from the input of ``last`` through pointwise operations to linear layers only."""
    (entry,) = last.all_input_nodes
    between: set[fx.Node] = set()
    first: set[fx.Node] = set()
    waiting = [entry]
    while waiting:
        node = waiting.pop()
        if node in between or node in first:
            continue
        if is_linear(node):
            first.add(node)
        elif _is_pointwise(node):
            between.add(node)
            waiting.extend(node.all_input_nodes)
        else:
            return None
    inside = {*between, last}
    if not first or any(user not in inside for node in first | between for user in node.users):
        return None
    part = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in sorted(first | between):  # in the order of the graph
        if node in first:
            copies[node] = part.placeholder(str(node.target).replace(".", "_"))
        else:
            copies[node] = part.node_copy(node, lambda each: copies[each])
    part.output(copies[entry])
    return Pair(tuple(str(node.target) for node in sorted(first)), str(last.target), part)


def _is_pointwise(node: fx.Node) -> bool:
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    # Not where operands of different shapes meet: a tile of one is not a tile of the other.
    shapes = {tuple(n.meta["shape"]) for n in (node, *node.all_input_nodes) if "shape" in n.meta}
    return torch.Tag.pointwise in node.target.tags and len(shapes) == 1


def _input_of(node: fx.Node) -> str:
    inputs = node.all_input_nodes
    return inputs[0].name if inputs else ""
