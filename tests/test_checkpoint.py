"""Both kinds of activation checkpointing, and other users of saved-tensor hooks."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))

from rtp_wrap import Gather, Replicate, RotatedTensorParallel, ShardingPolicy
from tests.parity import check_parity, compare_gradients, full, mean_square
from tests.ranks import all_world_sizes, device, multi_world_sizes, run_ranks

SHARDED = ShardingPolicy(replicate_below=0)
POLICIES = {
    "rotated and gathered": SHARDED,
    "gathered": ShardingPolicy(rules={"*": Gather()}),
    "replicated": ShardingPolicy(rules={"*": Replicate()}),
    "mixed": ShardingPolicy(rules={"*.norm": Replicate(), "*.up": Gather()}, replicate_below=0),
}
BLOCKS = 2
Call = Callable[..., Any]


class Block(nn.Module):
    """Layers that rotate, that are gathered and that may be replicated, and a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 6)
        self.mix = nn.Conv1d(4, 4, 1)
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.down(torch.tanh(self.up(self.norm(x)))) * self.scale
        return self.mix(x)


class Model(nn.Module):
    """``call(function, x)`` runs what is to be checkpointed."""

    def __init__(self, call: Call, nested: bool = False) -> None:
        super().__init__()
        self.call, self.nested = call, nested
        self.first = nn.Linear(6, 6)
        self.blocks = nn.ModuleList([Block() for _ in range(BLOCKS)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        if self.nested:
            return self.call(self.all_blocks, x)
        return self.all_blocks(x)

    def all_blocks(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = self.call(block, x)
        return x


class Lambdas(nn.Module):
    """Recomputation begins below any adopted forward: functions that read weights themselves."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6)
        self.own = nn.Parameter(torch.randn(6, 6) / 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        x = self.call(lambda x: torch.tanh(F.linear(x, self.own) + self.last.bias), x)
        return self.call(lambda x: torch.tanh(F.linear(x, self.last.weight) * self.own.mean()), x)


def plain(function: Call, *arguments: Any) -> Any:
    return function(*arguments)


def reentrant(function: Call, *arguments: Any) -> Any:
    with warnings.catch_warnings():  # nested, the inner one runs first under the outer's no_grad
        warnings.filterwarnings("ignore", "None of the inputs have requires_grad")
        return checkpoint(function, *arguments, use_reentrant=True)


def not_reentrant(function: Call, *arguments: Any) -> Any:
    return checkpoint(function, *arguments, use_reentrant=False)


def without_early_stop(function: Call, *arguments: Any) -> Any:
    with set_checkpoint_early_stop(False):
        return checkpoint(function, *arguments, use_reentrant=False, determinism_check="default")


CALLS = {call.__name__: call for call in (reentrant, not_reentrant, without_early_stop)}


def batch(step: int, rank: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return (torch.randn((2, 4, 6), generator=generator),)


def _check_checkpointed(call: str) -> None:
    for name, policy in POLICIES.items():
        if name == "replicated":
            continue  # below, and in the mixed model
        nested = name == "mixed"
        check_parity(lambda: Model(CALLS[call], nested), batch, steps=2, policy=policy)  # noqa: B023
    for name in ("rotated and gathered", "replicated"):
        check_parity(lambda: Lambdas(CALLS[call]), batch, steps=2, policy=POLICIES[name])


@all_world_sizes
@pytest.mark.parametrize("call", CALLS)
def test_checkpointed_blocks_train_like_the_dense_ones(world_size: int, call: str) -> None:
    run_ranks(world_size, _check_checkpointed, call)


def _keeps_products(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """As training scripts have it: products are kept, the rest is computed again."""
    kept = op in (
        torch.ops.aten.mm.default,
        torch.ops.aten.addmm.default,
        torch.ops.aten.tanh.default,
    )
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def selective(function: Call, *arguments: Any) -> Any:
    context = functools.partial(create_selective_checkpoint_contexts, _keeps_products)
    return checkpoint(function, *arguments, use_reentrant=False, context_fn=context)


def _check_selective(transport: str) -> None:
    policy = replace(POLICIES["mixed"], transport=transport)
    check_parity(lambda: Model(selective), batch, steps=4, policy=policy)


@pytest.mark.parametrize("transport", ["peer", "ring"])
@multi_world_sizes
def test_selective_checkpointing_keeps_what_a_policy_says(world_size: int, transport: str) -> None:
    """It takes operations of a recomputation by their number: tiles are fetched at other times."""
    run_ranks(world_size, _check_selective, transport)


def _check_frozen(call: str) -> None:
    def freeze(model: nn.Module) -> None:
        for fqn, parameter in model.named_parameters():
            parameter.requires_grad_("scale" in fqn or "first" in fqn)

    check_parity(lambda: Model(CALLS[call]), batch, steps=2, prepare=freeze, policy=SHARDED)


@pytest.mark.parametrize("call", CALLS)
@multi_world_sizes
def test_frozen_layers_can_be_checkpointed(world_size: int, call: str) -> None:
    run_ranks(world_size, _check_frozen, call)


def _check_wrappers(implementation: str) -> None:
    kind = CheckpointImpl[implementation]

    def wrap_blocks(model: nn.Module) -> None:
        apply_activation_checkpointing(
            model,
            checkpoint_wrapper_fn=lambda module: checkpoint_wrapper(module, kind),
            check_fn=lambda module: isinstance(module, Block),
        )

    for policy in (POLICIES["rotated and gathered"], POLICIES["replicated"]):
        before = check_parity(lambda: Model(plain), batch, prepare=wrap_blocks, policy=policy)
        assert "CheckpointWrapper" in repr(before)
        # After wrapping: the dense model is as good as the checkpointed one.
        torch.manual_seed(0)
        dense = Model(plain).to(device(), torch.float64)
        torch.manual_seed(0)
        after = RotatedTensorParallel(Model(plain).double(), policy=policy)
        wrap_blocks(after)
        assert all("CheckpointWrapper" in type(block).__name__ for block in after.blocks)
        x = batch(0, 0)[0].to(device(), torch.float64)
        mean_square(dense(x)).backward()
        mean_square(after(x)).backward()
        theirs = dict(dense.named_parameters())
        for fqn, parameter in after.named_parameters():
            expected = theirs[fqn.replace("_checkpoint_wrapped_module.", "")].grad
            torch.testing.assert_close(full(parameter.grad), expected)


@all_world_sizes
@pytest.mark.parametrize("implementation", ["REENTRANT", "NO_REENTRANT"])
def test_torchs_checkpoint_wrapper_works_before_and_after_wrapping(
    world_size: int, implementation: str
) -> None:
    run_ranks(world_size, _check_wrappers, implementation)


def _check_sequential() -> None:
    class Segments(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(*[Block() for _ in range(BLOCKS)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint_sequential(self.layers, 2, x, use_reentrant=False)

    check_parity(Segments, batch, policy=SHARDED)


@multi_world_sizes
def test_sequences_can_be_checkpointed_in_segments(world_size: int) -> None:
    run_ranks(world_size, _check_sequential)


class Observer:
    """A user's own hooks; how many elements each tensor had that they saw."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        self.seen.append(tensor.numel())
        return tensor.detach().clone()

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        return packed


def _gradients_under(context: contextlib.AbstractContextManager[Any], model: nn.Module) -> None:
    model.zero_grad()
    with context:
        loss = mean_square(model(batch(0, 0)[0].to(device(), torch.float64)))
    loss.backward()


def _check_hooks() -> None:
    for call in (plain, reentrant, not_reentrant):
        for policy in (POLICIES["rotated and gathered"], POLICIES["mixed"]):
            torch.manual_seed(0)
            dense = Model(call).to(device(), torch.float64)
            torch.manual_seed(0)
            wrapped = RotatedTensorParallel(Model(call).double(), policy=policy)
            _gradients_under(contextlib.nullcontext(), dense)
            _gradients_under(torch.autograd.graph.save_on_cpu(), wrapped)
            compare_gradients(dense, wrapped, when="save_on_cpu")
            observer = Observer()
            hooks = torch.autograd.graph.saved_tensors_hooks(observer.pack, observer.unpack)
            _gradients_under(hooks, wrapped)
            compare_gradients(dense, wrapped, when="own hooks")
            if call is not reentrant:  # which saves nothing under the caller's hooks but its input
                assert observer.seen
            tokens = 2 * 4 * 9  # elements of the largest activation
            assert all(numel <= tokens for numel in observer.seen)


@all_world_sizes
def test_hooks_around_the_model_are_asked(world_size: int) -> None:
    run_ranks(world_size, _check_hooks)


def _check_all_seen() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv1d(4, 5, 1), nn.Tanh(), nn.Conv1d(5, 3, 1), nn.Tanh(), nn.Linear(6, 2)]
    dense = nn.Sequential(*layers).to(device(), torch.float64)
    x = batch(0, 0)[0].to(device(), torch.float64)
    weights = {parameter.numel() for parameter in dense.parameters()}
    assert not weights & {x.numel(), x.numel() * 5 // 4, x.numel() * 3 // 4}, "tell them apart"
    seen = []
    for model in (dense, RotatedTensorParallel(deepcopy(dense), policy=POLICIES["gathered"])):
        observer = Observer()
        with torch.autograd.graph.saved_tensors_hooks(observer.pack, observer.unpack):
            mean_square(model(x)).backward()
        seen.append(sorted(numel for numel in observer.seen if numel not in weights))
    assert seen[0] == seen[1]


@multi_world_sizes
def test_hooks_around_see_every_activation_of_a_gathered_module(world_size: int) -> None:
    run_ranks(world_size, _check_all_seen)


class HooksInside(nn.Module):
    """Hooks entered inside a forward, before and after it first reads its weight."""

    def __init__(self, read_first: bool) -> None:
        super().__init__()
        self.read_first = read_first
        self.weight = nn.Parameter(torch.randn(6, 6) / 3)
        self.conv = nn.Conv1d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.read_first:
            x = x @ self.weight
        else:  # torch refuses to disable hooks where some are in force already
            with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
                x = torch.tanh(self.conv(x))
        before = torch._C._autograd._top_saved_tensors_default_hooks(False)
        with _doubling():
            x = torch.tanh(self.conv(x @ self.weight))
        assert torch._C._autograd._top_saved_tensors_default_hooks(False) == before
        return torch.tanh(x @ self.weight)


@contextlib.contextmanager
def _doubling() -> Iterator[None]:
    """What goes in comes out, by way of a sum."""
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: (tensor.detach() / 2, tensor.detach() / 2), lambda parts: parts[0] + parts[1]
    ):
        yield


def _check_hooks_inside() -> None:
    for read_first in (False, True):
        for name in ("rotated and gathered", "replicated"):
            check_parity(lambda: HooksInside(read_first), batch, policy=POLICIES[name])  # noqa: B023
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None


@all_world_sizes
def test_hooks_inside_a_forward_are_composed_and_left_in_order(world_size: int) -> None:
    run_ranks(world_size, _check_hooks_inside)


class Broken(nn.Module):
    """Raises in the middle, on all ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.broken = False
        self.conv = nn.Conv1d(4, 4, 1)
        self.linear = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.linear(self.conv(x))
        if self.broken:
            raise KeyError("broken")
        return self.conv(x)


def _check_exception() -> None:
    for call in (plain, reentrant, not_reentrant):
        torch.manual_seed(0)
        dense = nn.Sequential(Broken()).to(device(), torch.float64)
        torch.manual_seed(0)
        wrapped = RotatedTensorParallel(nn.Sequential(Broken()).double(), policy=SHARDED)
        x = batch(0, 0)[0].to(device(), torch.float64).requires_grad_()
        wrapped[0].broken = True
        with pytest.raises(KeyError, match="broken"):
            call(wrapped, x)
        wrapped[0].broken = False
        assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None
        assert isinstance(wrapped[0].conv.weight, nn.Parameter)
        mean_square(call(wrapped, x)).backward()
        mean_square(dense(x)).backward()
        compare_gradients(dense, wrapped)


@all_world_sizes
def test_an_exception_on_all_ranks_leaves_everything_usable(world_size: int) -> None:
    run_ranks(world_size, _check_exception)
