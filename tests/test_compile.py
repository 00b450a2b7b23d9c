"""Compiled blocks: one graph for all equal ones, and the results of the dense model."""

from __future__ import annotations

import functools
import pickle
import shutil
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))

from rtp_wrap import (
    Gather,
    MixedPrecisionPolicy,
    Replicate,
    Rotate,
    RotatedTensorParallel,
    ShardingPolicy,
)
from tests.parity import FP64, fulls, mean_square, sgd
from tests.ranks import THOROUGH, WORLD_SIZES, device, run_ranks
from tests.rotated import COMPILERS_WARNINGS, events

pytestmark = COMPILERS_WARNINGS

WIDTH = 8
#: Weights rotate, biases and norms are replicated.
POLICY = ShardingPolicy(replicate_below=2 * WIDTH + 1)


class Block(nn.Module):
    """Attention and an MLP, with biases and a layer norm; its linears have different sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + attended.transpose(1, 2).flatten(2)
        return x + self.down(F.gelu(self.up(x)))


class LlamaBlock(nn.Module):
    """The layers of ``examples/llama.py``: RMS norms, grouped queries, a gated MLP, no biases."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.q, self.k = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, 4, bias=False)
        self.v, self.out = nn.Linear(WIDTH, 4, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate = nn.Linear(WIDTH, 12, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 12, bias=False), nn.Linear(12, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.attention_norm(x)
        q, k, v = (p(y).unflatten(-1, (-1, 4)).transpose(1, 2) for p in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        y = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Checkpointed(Block):
    """Checkpointing inside of what is compiled."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


class Repeating(nn.Module):
    """Uses a layer twice, and another one where only its own input needs a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.side = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer(torch.tanh(self.layer(x)))
        return x * torch.sigmoid(self.side(x.detach()))


class Model(nn.Module):
    """Some equal blocks behind a linear layer, so that the first one's input needs a gradient."""

    def __init__(self, block: Callable[[], nn.Module] = Block, blocks: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(block() for _ in range(blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.first(x))
        for block in self.blocks:
            x = block(x)
        return x


def in_one_size_each(name: str, cases: dict[str, Any]) -> pytest.MarkDecorator:
    """Parametrize by ``world_size`` and ``name``: the sizes take turns, since compiling takes long.

    The first case is with two ranks, the third one with one.
    """
    sizes = [*WORLD_SIZES[1:3], *WORLD_SIZES[:1]]
    pairs = [
        (size, case)
        for index, case in enumerate(cases)
        for size in (WORLD_SIZES if THOROUGH else [sizes[index % len(sizes)]])
    ]
    return pytest.mark.parametrize(("world_size", name), pairs)


def compile_in_place(model: nn.Module, backend: Any = "aot_eager") -> None:
    for block in model.blocks:  # type: ignore[union-attr]
        block.compile(backend=backend, fullgraph=True)


def compile_and_assign(model: nn.Module, backend: Any = "aot_eager") -> None:
    for index, block in enumerate(model.blocks):  # type: ignore[arg-type, union-attr]
        model.blocks[index] = torch.compile(block, backend=backend, fullgraph=True)  # type: ignore[index, operator]


def part(step: int, rank: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """One rank's samples: another number of them on each rank, and in each step."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    samples = 2 + rank + 2 * (step % 2)
    return torch.randn(samples, 3, WIDTH, generator=generator, dtype=torch.float64).to(
        device(), dtype
    )


def pair(
    build: Callable[[], nn.Module] = Model,
    *,
    before: Callable[[nn.Module], None] = lambda model: None,
    after: Callable[[nn.Module], None] = lambda model: None,
    prepare: Callable[[nn.Module], None] = lambda model: None,
    dtype: torch.dtype = torch.float64,
    policy: ShardingPolicy = POLICY,
    **wrap: Any,
) -> tuple[nn.Module, RotatedTensorParallel]:
    """A dense model and a wrapped copy, with ``before`` and ``after`` done around wrapping."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    dense = build().to(device(), dtype)
    prepare(dense)
    mine = deepcopy(dense)
    before(mine)
    wrapped = RotatedTensorParallel(mine, policy=policy, **wrap)
    after(wrapped)
    return dense, wrapped


Pass = Callable[[nn.Module, torch.Tensor], None]


def plain(model: nn.Module, x: torch.Tensor) -> None:
    mean_square(model(x)).backward()


def train(
    dense: nn.Module, wrapped: nn.Module, pass_: Pass = plain, steps: int = 3, name: str = ""
) -> None:
    """Both make the same steps, the dense one on every rank's samples, and are compared."""
    optimizers = [sgd(dense.parameters()), sgd(wrapped.parameters())]
    ranks = dist.get_world_size()
    for step in range(steps):
        for rank in range(ranks):
            pass_(dense, part(step, rank))
        for parameter in dense.parameters():
            if parameter.grad is not None:
                parameter.grad /= ranks
        pass_(wrapped, part(step, dist.get_rank()))
        compare(dense, wrapped, f"{name} {step}: gradients", lambda parameter: parameter.grad)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        compare(dense, wrapped, f"{name} {step}: weights", torch.Tensor.detach)


def compare(
    dense: nn.Module, wrapped: nn.Module, when: str, value: Callable[[Any], torch.Tensor | None]
) -> None:
    """By order: ``torch.compile(block)`` has other names."""
    expected, found = {}, []
    for (fqn, theirs), ours in zip(dense.named_parameters(), wrapped.parameters(), strict=True):
        their, our = value(theirs), value(ours)
        assert (our is None) == (their is None), f"{when} of {fqn}: presence"
        if their is not None and our is not None:
            expected[fqn] = their
            found.append(our)
    for (fqn, their), our in zip(expected.items(), fulls(found), strict=True):
        message = functools.partial("{}: {}".format, f"{when} of {fqn}")
        torch.testing.assert_close(our, their, **FP64, msg=message)


# One graph.


class Counting:
    """A backend that keeps the graphs which it is given, and leaves them to another one."""

    def __init__(self, backend: str = "eager") -> None:
        self.graphs: list[torch.fx.GraphModule] = []
        self._compile = torch._dynamo.lookup_backend(backend)

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.graphs.append(graph)
        return self._compile(graph, inputs)


def _check_one_graph(block: Callable[[], nn.Module], compiling: str) -> None:
    counting = Counting()
    compile_ = functools.partial(COMPILING[compiling], backend=counting)
    when = {"after" if compiling.endswith("after") else "before": compile_}
    dense, wrapped = pair(functools.partial(Model, block), **when)
    counts = []
    for step in range(4):
        x = part(step, dist.get_rank())
        torch.testing.assert_close(wrapped(x), dense(x), **FP64)
        counts.append(len(counting.graphs))
    assert counts == [1, 2, 2, 2], counts  # of one batch size, then of any
    wrapped.eval()
    with torch.no_grad():
        torch.testing.assert_close(wrapped(x), dense(x), **FP64)
    assert len(counting.graphs) == 3, counts


COMPILING: dict[str, Callable[..., None]] = {
    "in place, before": compile_in_place,
    "in place, after": compile_in_place,
    "assigned, before": compile_and_assign,
    "assigned, after": compile_and_assign,
}


ONE_GRAPH = {
    **{compiling: (Block, compiling) for compiling in COMPILING},
    "llama": (LlamaBlock, "in place, before"),
}


@in_one_size_each("case", ONE_GRAPH)
def test_equal_blocks_are_one_graph_without_a_break(world_size: int, case: str) -> None:
    run_ranks(world_size, _check_one_graph, *ONE_GRAPH[case])


# Training.


def _check_training(block: Callable[[], nn.Module], transport: str, compiling: str) -> None:
    when = {"after" if compiling.endswith("after") else "before": COMPILING[compiling]}
    policy = ShardingPolicy(replicate_below=2 * WIDTH + 1, transport=transport)
    train(*pair(functools.partial(Model, block, 2), policy=policy, **when))


CASES = {
    "plain": (Block, "ring", "in place, before"),
    "llama": (LlamaBlock, "ring", "in place, after"),
    "alone": (Block, "ring", "in place, before"),
    "checkpointed": (Checkpointed, "ring", "assigned, before"),
    "peers": (Block, "peer", "assigned, after"),
}


@in_one_size_each("case", CASES)
def test_training_is_that_of_the_dense_model(world_size: int, case: str) -> None:
    run_ranks(world_size, _check_training, *CASES[case])


# Passes: ways to come to gradients, one after the other with one compiled model.


def accumulating(model: nn.Module, x: torch.Tensor) -> None:
    for inputs in (x, x * 2, x + 1):
        mean_square(model(inputs)).backward()


def two_forwards_first(model: nn.Module, x: torch.Tensor) -> None:
    first, second = model(x), model(x * 2)
    mean_square(first).backward()
    mean_square(second).backward()


def one_loss_of_two_forwards(model: nn.Module, x: torch.Tensor) -> None:
    (mean_square(model(x)) + mean_square(model(x * 2))).backward()


def evaluating_between(model: nn.Module, x: torch.Tensor) -> None:
    model.eval()
    with torch.inference_mode():
        model(x * 4)
    y = model(x)
    with torch.no_grad():
        model(x * 3)
    model.train()
    mean_square(y).backward()


def of_the_input_first(model: nn.Module, x: torch.Tensor) -> None:
    """A backward that makes gradients of weights which nobody takes."""
    inputs = x.clone().requires_grad_()
    torch.autograd.grad(mean_square(model(inputs)), inputs)
    mean_square(model(x)).backward()


def retaining(model: nn.Module, x: torch.Tensor) -> None:
    """Not for compiled blocks; with some, already the first backward raises."""
    loss = mean_square(model(x))
    loss.backward(retain_graph=True)
    loss.backward()


def checkpointed(model: nn.Module, x: torch.Tensor) -> None:
    mean_square(checkpoint(model, x, use_reentrant=False)).backward()


def checkpointed_reentrant(model: nn.Module, x: torch.Tensor) -> None:
    y = checkpoint(model, x.clone().requires_grad_(), use_reentrant=True)
    mean_square(y).backward()


def of_two_weights(model: nn.Module, x: torch.Tensor) -> None:
    """Each backward has the weights of its own forward, also where those are others' by then."""
    inner: Any = getattr(model, "module", model)
    named = inner.blocks.named_parameters(prefix="blocks")
    doubled = {fqn: weight * 2 for fqn, weight in named if weight.dim() == 2}
    first, second = functional_call(inner, doubled, x), model(x)
    (mean_square(first) + mean_square(second)).backward()
    with torch.no_grad():
        others = {fqn: weight * 3 for fqn, weight in doubled.items()}
    loss = mean_square(model(x))
    with torch.no_grad():
        functional_call(inner, others, x)
    loss.backward()


PASSES: tuple[Pass, ...] = (
    evaluating_between,  # inference is the first call of all
    accumulating,
    two_forwards_first,
    one_loss_of_two_forwards,
    of_the_input_first,
    checkpointed,
    checkpointed_reentrant,
    of_two_weights,
)


def _check_passes(transport: str) -> None:
    policy = ShardingPolicy(replicate_below=2 * WIDTH + 1, transport=transport)
    dense, wrapped = pair(
        functools.partial(Model, Repeating, 2), before=compile_in_place, policy=policy
    )
    for pass_ in PASSES:
        train(dense, wrapped, pass_, 1, pass_.__name__)


@in_one_size_each("transport", {"ring": None, "peer": None})
def test_every_way_to_gradients(world_size: int, transport: str) -> None:
    run_ranks(world_size, _check_passes, transport)


def _freeze(model: nn.Module) -> None:
    model.first.requires_grad_(False)  # type: ignore[union-attr]
    for block in model.blocks:  # type: ignore[union-attr]
        block.layer.weight.requires_grad_(False)


def _check_frozen() -> None:
    dense, wrapped = pair(
        functools.partial(Model, Repeating, 2), before=compile_in_place, prepare=_freeze
    )
    train(dense, wrapped, steps=2)
    x = part(0, dist.get_rank())
    loss = mean_square(wrapped(x))
    wrapped.load_state_dict(wrapped.state_dict())
    with pytest.raises(RuntimeError, match=r"blocks.1.side was written"):
        loss.backward()
    loss = mean_square(wrapped(x))
    with torch.no_grad():
        wrapped.blocks[1].layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"blocks.1.layer was written"):
        loss.backward()


def test_frozen_weights() -> None:
    run_ranks(2, _check_frozen)


def _check_write() -> None:
    _, wrapped = pair(functools.partial(Model, Repeating, 1), before=compile_in_place)
    x = part(0, dist.get_rank())
    optimizer = torch.optim.AdamW(wrapped.parameters(), foreach=True)
    mean_square(wrapped(x)).backward()
    for forward in (wrapped, functools.partial(checkpoint, wrapped, use_reentrant=False)):
        loss = mean_square(forward(x))
        optimizer.step()
        with pytest.raises(RuntimeError, match=r"(first|blocks.0\.\w+) was written"):
            loss.backward()
    with pytest.raises(RuntimeError, match=r"retain_graph|modified by an inplace operation"):
        retaining(wrapped, x)


def test_a_write_before_backward_and_a_second_backward_are_errors() -> None:
    run_ranks(2, _check_write)


# What else a model is made of.


class Various(nn.Module):
    """A graph, and modules that no graph can contain between its parts; a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3, WIDTH))
        self.up, self.norm = nn.Linear(WIDTH, 5), nn.BatchNorm1d(3)
        self.down = nn.Linear(5, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.down(torch.tanh(self.norm(self.up(x * self.scale))))
        return x + self.attention(x, x, x)[0]


def _check_various(name: str) -> None:
    policy = POLICIES[name]

    def in_parts(model: nn.Module) -> None:
        for block in model.blocks:  # type: ignore[union-attr]
            block.compile(backend="aot_eager")

    dense, wrapped = pair(functools.partial(Model, Various, 1), before=in_parts, policy=policy)
    # A batch norm's statistics are of one rank's samples: the dense one's must not be of all.
    dense.eval(), wrapped.eval()
    with events() as seen:
        train(dense, wrapped, steps=2)
    # Graphs keep what they need of gathered weights.
    assert not any("up.weight gather for backward" in event for event in seen)
    # Attention reads its output projection without calling it, unless it is rotated.
    sites = {site.fqn for site in wrapped.plan.sites or ()} - {"blocks.0.attention.out_proj"}
    assert sites == SITES


SITES = {
    "first",
    "blocks.0",
    "blocks.0.up",
    "blocks.0.norm",
    "blocks.0.down",
    "blocks.0.attention",
}


POLICIES = {
    "gathered": ShardingPolicy(rules={"*": Gather()}),
    "rotated": ShardingPolicy(replicate_below=0),
    "columns": ShardingPolicy(rules={"*.up": Rotate(dim=1)}),
}


@in_one_size_each("policy", POLICIES)
def test_modules_that_no_graph_contains_run_between_its_parts(world_size: int, policy: str) -> None:
    run_ranks(world_size, _check_various, policy)


def _check_precision() -> None:
    mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)
    x = part(0, dist.get_rank(), torch.float32)
    outputs, gradients = [], []
    for compiles in (True, False):
        for precision, autocast in ((mixed, False), (None, True)):
            counting = Counting("aot_eager")
            _, wrapped = pair(dtype=torch.float32, mixed_precision=precision)
            if compiles:
                compile_in_place(wrapped, counting)
            with torch.autocast(device().type, torch.bfloat16, enabled=autocast):
                outputs.append(wrapped(x))
            assert len(counting.graphs) == int(compiles)
            mean_square(outputs[-1].float()).backward()
            gradients.append(fulls(parameter.grad for parameter in wrapped.parameters()))
    # bf16 has 8 bits, and a graph rounds at other places than single operations do.
    for compiled, eager in ((0, 2), (1, 3)):
        assert outputs[compiled].dtype == outputs[eager].dtype
        torch.testing.assert_close(outputs[compiled], outputs[eager], rtol=0.02, atol=0.02)
        torch.testing.assert_close(gradients[compiled], gradients[eager], rtol=0.02, atol=0.02)


def test_mixed_precision_and_autocast() -> None:
    run_ranks(2, _check_precision)


def _check_copies() -> None:
    dense, wrapped = pair(functools.partial(Model, Repeating, 1))
    compile_in_place(wrapped, "eager")
    x = part(0, dist.get_rank())
    wrapped(x)
    copy = deepcopy(wrapped)
    compile_in_place(copy, "eager")
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.mul_(2)
        for parameter in dense.parameters():
            parameter.mul_(2)
    torch.testing.assert_close(copy(x), dense(x), **FP64)
    for module in wrapped.modules():
        assert vars(module).get("_captured") is None


def test_a_copy_has_its_own_weights_and_nothing_outlives_a_call() -> None:
    run_ranks(2, _check_copies)


def _check_assigned_copies() -> None:
    """What ``torch.compile(block)`` returned makes its copies in its own way."""
    for copied in (deepcopy, lambda model: pickle.loads(pickle.dumps(model))):
        dense, wrapped = pair(functools.partial(Model, blocks=1), before=compile_and_assign)
        train(dense, copied(wrapped), steps=2)


def test_copies_of_assigned_blocks_train() -> None:
    run_ranks(2, _check_assigned_copies)


def _check_nothing_pends() -> None:
    """A gradient of the input alone computes those of weights, which nobody takes."""
    _, wrapped = pair(before=compile_in_place)
    x = part(0, dist.get_rank()).requires_grad_()
    torch.autograd.grad(mean_square(wrapped(x)), x)
    layers = [vars(each)["_layer"] for each in wrapped.modules() if "_layer" in vars(each)]
    assert len(layers) == 3 * 3
    assert not any(each.pending for each in layers)


def test_gradients_that_nobody_takes_are_dropped() -> None:
    run_ranks(2, _check_nothing_pends)


class Rows(nn.Module):
    """Whether its weight is needed for backward is a matter of how many rows it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(64, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ids = torch.arange(x.shape[0], device=x.device) % 64
        return x * torch.sin(self.table[ids])[:, None]


def _check_gathered(samples: list[int]) -> list[str]:
    """What this rank communicates in a step with so many samples."""
    policy = ShardingPolicy(rules={"*": Gather()})

    def partitioned(model: nn.Module) -> None:
        compile_in_place(model, "aot_eager_decomp_partition")

    _, wrapped = pair(functools.partial(Model, Rows, 1), before=partitioned, policy=policy)
    x = torch.ones(samples[dist.get_rank()], 3, WIDTH, dtype=torch.float64, device=device())
    with events() as seen:
        mean_square(wrapped(x)).backward()
    return seen


def test_ranks_gather_the_same_whatever_their_graphs_save() -> None:
    few, many = run_ranks(2, _check_gathered, [4, 512])
    assert few == many
    assert "blocks.0.table reduce-scatter" in few


class Tokens(nn.Module):
    """Not a block: a whole small model, that begins with an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.block = nn.Embedding(7, WIDTH), Repeating()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(self.embedding((x[..., 0] * 1000).long().remainder(7)))


def _compile_all(model: nn.Module) -> None:
    model.compile(backend="aot_eager")


def _check_whole_model() -> None:
    train(*pair(Tokens, before=_compile_all), steps=2)
    dense, wrapped = pair(Tokens)
    counting = Counting()
    compiled = torch.compile(wrapped, backend=counting)
    for _ in range(2):
        dense.zero_grad()
        wrapped.zero_grad()
        x = part(0, 0)
        mean_square(dense(x)).backward()
        mean_square(compiled(x)).backward()
        compare(dense, wrapped, "gradients", lambda parameter: parameter.grad)
    assert not counting.graphs


def test_a_whole_model_can_be_compiled_before_wrapping_and_is_not_afterwards() -> None:
    run_ranks(2, _check_whole_model)


def _check_errors() -> None:
    dense, wrapped = pair(functools.partial(Model, Repeating, 1), after=compile_in_place)
    x = torch.ones(WIDTH, dtype=torch.float64, device=device())
    for model in (dense, wrapped):
        mean_square(model(x)).backward()
    compare(dense, wrapped, "gradients of one vector", lambda parameter: parameter.grad)
    block = wrapped.blocks[0]
    with pytest.raises(TypeError, match=r"blocks.0.layer: input is torch.float32 but the layer"):
        block(torch.ones(2, WIDTH, dtype=torch.float32, device=device()))
    with pytest.raises(ValueError, match=r"blocks.0.layer: input of shape \(2, 3\) does not end"):
        block(torch.ones(2, 3, dtype=torch.float64, device=device()))


def test_a_vector_will_do_and_errors_name_the_layer() -> None:
    run_ranks(2, _check_errors)


class Transposed(nn.Module):
    """Hugging Face's linear layer, whose weight is ``[in, out]``."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.up, self.down = Conv1D(3 * WIDTH, WIDTH), Conv1D(WIDTH, 3 * WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(x)))


def test_layers_of_hugging_face() -> None:
    pytest.importorskip("transformers")
    run_ranks(2, _check_training, Transposed, "ring", "in place, before")


# The compiler that moves operators.


class Branches(nn.Module):
    """Layers that do not depend on each other, some of them without a use, of several sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(WIDTH, 64), nn.Linear(WIDTH, 4)
        self.unused, self.last = nn.Linear(WIDTH, 32), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.unused(x)
        y = F.gelu(self.wide(x)).mean(-1, keepdim=True) + torch.tanh(self.narrow(x)).mean()
        return y + self.last(x)


class CheckpointedBranches(Branches):
    """Which operators are computed again for the backward is the compiler's choice, too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


class Mixed(Model):
    def __init__(self) -> None:
        super().__init__(blocks=0)
        self.blocks.extend([Branches(), CheckpointedBranches()])


def _check_inductor() -> None:
    in_place = functools.partial(compile_in_place, backend="inductor")
    policy = ShardingPolicy(rules={"*bias": Replicate()}, replicate_below=0)
    with torch._inductor.config.patch(compile_threads=1):
        dense, wrapped = pair(Mixed, before=in_place, policy=policy)
        train(dense, wrapped, steps=3)
        x = part(0, dist.get_rank())
        with events() as compiled:
            mean_square(wrapped(x)).backward()
    uncompiled = RotatedTensorParallel(deepcopy(dense), policy=policy)
    with events() as eager:
        mean_square(uncompiled(x)).backward()
    assert "blocks.1.unused forward" in eager
    # torch 2.11 keeps what an operator in a checkpointed region returned, and has it only once.
    assert compiled in (eager, list(dict.fromkeys(eager)))


@pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated:DeprecationWarning")
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_inductor_keeps_the_order_with_another_batch_size_on_each_rank() -> None:
    run_ranks(2, _check_inductor)
