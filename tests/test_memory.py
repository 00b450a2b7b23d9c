"""What is alive, and when: 1/N of everything, a constant, and nothing left behind.

Storages are followed by weak references from the operation that made them, so tensors that only
autograd's C++ nodes hold count too; on the CPU the result is the same each time.
"""

from __future__ import annotations

import contextlib
import gc
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))

from rtp_wrap import Gather, Replicate, RotatedTensorParallel, ShardingPolicy
from rtp_wrap.ring import Ring
from tests.parity import mean_square, sgd
from tests.ranks import (
    DEVICE_TYPE,
    WORLD_SIZES,
    all_world_sizes,
    device,
    multi_world_sizes,
    run_ranks,
)
from tests.rotated import by_ring

SHARDED = ShardingPolicy(replicate_below=0)
GATHERED = {"*": Gather()}
#: Of the sizes to test with, an even one and one that divides nothing here.
some_world_sizes = pytest.mark.parametrize(
    "world_size", [size for size in WORLD_SIZES if size in (2, 3)] or WORLD_SIZES[-1:]
)
WIDTH = 64
DEPTH = 3


class Storages(TorchDispatchMode):
    """Follows the storage of every tensor that an operation makes, but not those of ``known``."""

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self._known = {StorageWeakRef(each.untyped_storage()) for each in known}
        self._made: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if type(tensor) is torch.Tensor and tensor.layout is torch.strided:
                storage = tensor.untyped_storage()
                if StorageWeakRef(storage) not in self._known:
                    self._made[StorageWeakRef(storage)] = storage.nbytes()
        return result

    def alive(self, above: int = 0, allowed: int = 0) -> list[int]:
        """The sizes in bytes of those that are alive and have more than ``above`` bytes.

        If they are more than ``allowed`` bytes together, that is looked at again for a while:
        Gloo's threads let go of a buffer a moment after the collective is over.
        """
        deadline = time.monotonic() + 1.0
        while True:
            self._made = {ref: size for ref, size in self._made.items() if not ref.expired()}
            sizes = sorted(size for size in self._made.values() if size > above)
            if sum(sizes) <= allowed or time.monotonic() > deadline:
                return sizes
            time.sleep(0.001)


class Convolutions(nn.Module):
    shape = (1, WIDTH, 2)
    numel = WIDTH * WIDTH  # of the smallest gathered weight

    def __init__(self, call: Callable[..., Any], depth: int = DEPTH) -> None:
        super().__init__()
        self.call = call
        self.layers = nn.ModuleList(self.layer() for _ in range(depth))

    def layer(self) -> nn.Module:
        return nn.Conv1d(WIDTH, WIDTH, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(self.call(layer, x))
        return x


class Linears(Convolutions):
    shape = (2, WIDTH)

    def layer(self) -> nn.Module:
        return nn.Linear(WIDTH, WIDTH)


class Attentions(Linears):
    shape = (1, 2, WIDTH)

    def layer(self) -> nn.Module:
        return SelfAttention(nn.MultiheadAttention(WIDTH, 2, batch_first=True))


class SelfAttention(nn.Module):
    def __init__(self, inner: nn.MultiheadAttention) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x, x, x, need_weights=False)[0]


class Recurrents(Linears):
    shape = (1, 2, WIDTH)
    numel = 4 * WIDTH * WIDTH

    def layer(self) -> nn.Module:
        return Output(nn.LSTM(WIDTH, WIDTH))


class Output(nn.Module):
    def __init__(self, inner: nn.LSTM) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)[0]


class ReadsChildren(Linears):
    """The root has no parameter of its own, and reads those of others."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(F.linear(self.call(layer, x), layer.weight))
        return x


def plain(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


def reentrant(function: Callable[..., Any], *arguments: Any) -> Any:
    return checkpoint(function, *arguments, use_reentrant=True)


def not_reentrant(function: Callable[..., Any], *arguments: Any) -> Any:
    return checkpoint(function, *arguments, use_reentrant=False)


MODELS = (Convolutions, Linears, Attentions, Recurrents, ReadsChildren)
CALLS = (plain, reentrant, not_reentrant)
CONTEXTS: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "alone": contextlib.nullcontext,
    "autocast": lambda: torch.autocast(DEVICE_TYPE, torch.bfloat16),
    "save_on_cpu": torch.autograd.graph.save_on_cpu,
    "both": lambda: _both(),
}


@contextlib.contextmanager
def _both() -> Iterator[None]:
    with CONTEXTS["autocast"](), CONTEXTS["save_on_cpu"]():
        yield


def _wrapped(build: Callable[[], nn.Module], **wrap: Any) -> RotatedTensorParallel:
    torch.manual_seed(0)
    return RotatedTensorParallel(build().to(device()), **wrap)


def _ring(wrapped: RotatedTensorParallel) -> Ring:
    adoption = wrapped.module._adoption
    assert isinstance(adoption.ring, Ring)
    return adoption.ring


def _staging(ring: Ring) -> list[torch.Tensor]:
    """The memory that tiles are in."""
    if ring.peers is None:
        return list(ring.staging.slots(2))
    return [ring.peers._memory.of(rank) for rank in range(ring.world_size)]


def _known(wrapped: RotatedTensorParallel) -> list[torch.Tensor]:
    """Home shards, staging and the lockstep's few bytes, which are always there."""
    homes = [parameter.to_local() for parameter in wrapped.parameters()]
    ring = _ring(wrapped)
    buffers = [ring.lockstep.buffer] if ring.world_size > 1 else []
    return [*homes, *_staging(ring), *buffers]


def _input(model: type[Convolutions]) -> torch.Tensor:
    return torch.randn(model.shape, device=device(), requires_grad=True)


def _check_gathered(model: type[Convolutions]) -> None:
    for call in CALLS:
        for frozen in (False, True):
            wrapped = _wrapped(lambda: model(call), policy=GATHERED)  # noqa: B023
            for layer in wrapped.layers[:-1]:
                layer.requires_grad_(not frozen)
            for name in CONTEXTS if call is plain else ("both",):
                what = f"{call.__name__}, {frozen=}, {name}"
                _check_weights_gone(wrapped, model, CONTEXTS[name], what)
    for call in CALLS:
        wrapped = _wrapped(lambda: model(call), policy=SHARDED)  # noqa: B023
        _check_weights_gone(
            wrapped, model, CONTEXTS["alone"], f"{call.__name__}, not only gathered"
        )


def _check_weights_gone(
    wrapped: RotatedTensorParallel,
    model: type[Convolutions],
    context: Callable[[], contextlib.AbstractContextManager[Any]],
    what: str,
) -> None:
    storages = Storages(_known(wrapped))
    with storages, context():
        loss = mean_square(wrapped(_input(model)).float())
    alive = storages.alive(model.numel * 2 - 1)  # bytes of a weight cast to bfloat16
    assert alive == [], f"after forward, {what}: {alive}"
    with storages:
        loss.backward()
    wrapped.zero_grad()
    alive = storages.alive(model.numel * 2 - 1)
    assert alive == [], f"after backward, {what}: {alive}"


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
@some_world_sizes
def test_no_gathered_weight_is_alive_between_forward_and_backward(
    world_size: int, model: type[Convolutions]
) -> None:
    run_ranks(world_size, _check_gathered, model)


class Peak(Storages):
    """The most that is alive at one time; ``allowed`` is what it may be."""

    def __init__(self, above: int, allowed: int, known: Iterable[torch.Tensor]) -> None:
        super().__init__(known)
        self.sizes: list[int] = []
        self._above, self._allowed = above, allowed

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if sum(self.sizes) <= self._allowed:
            self.sizes = max(self.sizes, self.alive(self._above, self._allowed), key=sum)
        return result


def _check_peak() -> None:
    weight, depth = WIDTH * WIDTH * 4, 8
    # Not of a parent that reads its children's weights: it has them until its forward is over.
    for model in (Convolutions, Linears):
        for call in CALLS:
            wrapped = _wrapped(lambda: model(call, depth), policy=GATHERED)  # noqa: B023
            # Gradients exist already, so that what is new is for the time being.
            mean_square(wrapped(_input(model))).backward()
            # The weight, its gradient and the collectives' buffers: not all layers' weights.
            allowed = 4 * weight
            with Peak(weight - 1, allowed, _known(wrapped)) as peak:
                mean_square(wrapped(_input(model))).backward()
            assert sum(peak.sizes) <= allowed, (model, call, peak.sizes)


@some_world_sizes
def test_the_peak_has_the_whole_weights_of_one_layer(world_size: int) -> None:
    run_ranks(world_size, _check_peak)


def _check_gradients() -> None:
    for model in MODELS:
        wrapped = _wrapped(lambda: model(plain), policy=SHARDED)  # noqa: B023
        whole = {name: parameter.shape for name, parameter in wrapped.named_parameters()}
        for _ in range(2):  # the second accumulates
            mean_square(wrapped(_input(model))).backward()
            for name, parameter in wrapped.named_parameters():
                grad = parameter.grad
                assert isinstance(grad, DTensor)
                local = grad.to_local()
                assert local.shape == parameter.to_local().shape, name
                rows = -(-whole[name][0] // dist.get_world_size())
                assert local.shape[0] <= rows
                # Not a view of something whole.
                assert local.untyped_storage().nbytes() <= rows * whole[name][1:].numel() * 4, name


@all_world_sizes
def test_gradients_are_one_nth_at_all_times(world_size: int) -> None:
    run_ranks(world_size, _check_gradients)


@by_ring
def _check_staging() -> None:
    def stack(width: int, depth: int) -> Callable[[], nn.Module]:
        return lambda: nn.Sequential(*[nn.Linear(width, width) for _ in range(depth)])

    nbytes = 8192
    for inplace in (False, True):
        for width, depth in ((64, 1), (64, 3), (96, 2)):
            policy = ShardingPolicy(replicate_below=0, staging_bytes=nbytes)
            wrapped = _wrapped(stack(width, depth), policy=policy, inplace=inplace)
            staging = _ring(wrapped).staging
            assert staging.nbytes == nbytes
            address = [slot.data_ptr() for slot in staging.slots(4)]
            optimizer = sgd(wrapped.parameters())
            x = torch.randn(3, width, device=device())
            shard = -(-width // dist.get_world_size()) * width * 4
            for _ in range(2):
                optimizer.zero_grad()
                # Gradients, activations, and nothing of a weight's size besides.
                activations = 3 * width * 4
                allowed = depth * (shard + width * 4) + (3 * depth + 8) * activations
                peak = Peak(0, allowed, _known(wrapped))
                with peak:
                    mean_square(wrapped(x)).backward()
                optimizer.step()
                assert sum(peak.sizes) <= allowed, (width, depth, allowed, peak.sizes)
            assert [slot.data_ptr() for slot in _ring(wrapped).staging.slots(4)] == address


@multi_world_sizes
def test_staging_is_what_the_policy_says_and_all_there_is(world_size: int) -> None:
    run_ranks(world_size, _check_staging)


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


POLICIES = {
    "by hops": ShardingPolicy(replicate_below=0, transport="ring"),
    "by peers": ShardingPolicy(replicate_below=0, transport="peer"),
    "gathered": GATHERED,
    "replicated": {"*": Replicate()},
}


def _check_freed() -> None:
    with _without_collector():
        for model in (Convolutions, Linears, Recurrents):
            for call in CALLS:
                for name, policy in POLICIES.items():
                    wrapped = _wrapped(lambda: model(call), policy=policy)  # noqa: B023
                    alive = _left_behind(wrapped, model)
                    assert alive == [], f"{model.__name__}, {call.__name__}, {name}: {alive}"


def _left_behind(wrapped: RotatedTensorParallel, model: type[Convolutions]) -> list[int]:
    optimizer = sgd(wrapped.parameters())
    _step(wrapped, optimizer, model)  # makes momentum
    with Storages(_known(wrapped)) as storages:
        for _ in range(2):
            _step(wrapped, optimizer, model)
        output = wrapped(_input(model))  # nobody wants its backward
        del output
    return storages.alive()


def _step(wrapped: nn.Module, optimizer: torch.optim.Optimizer, model: type[Convolutions]) -> None:
    mean_square(wrapped(_input(model))).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("world_size", sorted({WORLD_SIZES[0], *WORLD_SIZES[1:2]}))
def test_a_step_leaves_nothing_behind_without_the_garbage_collector(world_size: int) -> None:
    run_ranks(world_size, _check_freed)


def _check_deleted() -> None:
    for model in (Linears, Recurrents):
        for policy in POLICIES.values():
            original = model(plain).to(device())
            before = [StorageWeakRef(p.untyped_storage()) for p in original.parameters()]
            wrapped = RotatedTensorParallel(original, policy=policy)
            if dist.get_world_size() > 1 or DEVICE_TYPE == "cpu":
                assert all(ref.expired() for ref in before), "the whole weights are alive"
            mean_square(wrapped(_input(model))).backward()
            ring = weakref.ref(_ring(wrapped))
            slot = _staging(_ring(wrapped))[dist.get_rank() % 2].untyped_storage()
            staging = StorageWeakRef(slot)
            homes = [StorageWeakRef(p.to_local().untyped_storage()) for p in wrapped.parameters()]
            del slot, wrapped, original
            gc.collect()
            assert ring() is None
            assert staging.expired()
            assert all(home.expired() for home in homes)


@all_world_sizes
def test_a_deleted_model_takes_its_ring_and_staging_along(world_size: int) -> None:
    run_ranks(world_size, _check_deleted)


def _check_cuda() -> None:
    width, depth = 1024, 8
    weight = width * width * 4
    layers = [nn.Linear(width, width) for _ in range(depth)]
    wrapped = _wrapped(lambda: nn.Sequential(*layers), policy=GATHERED)
    x = torch.randn(4, width, device=device(), requires_grad=True)
    mean_square(wrapped(x)).backward()  # libraries take their workspaces
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss = mean_square(wrapped(x))
    assert torch.cuda.memory_allocated() - before < weight / 2
    loss.backward()
    # The weight, its gradient and the collectives' buffers.
    assert torch.cuda.max_memory_allocated() - before < 5 * weight


@pytest.mark.skipif(DEVICE_TYPE != "cuda", reason="CUDA counts what is allocated")
@multi_world_sizes
def test_the_allocator_agrees(world_size: int) -> None:
    run_ranks(world_size, _check_cuda)
