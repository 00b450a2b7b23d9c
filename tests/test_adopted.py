"""Adopted modules stay the objects that they were."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))

from rtp_wrap import Gather, Ignore, Replicate, RotatedTensorParallel, ShardingPolicy
from tests.parity import compare_gradients, compare_weights, full, mean_square, sgd
from tests.ranks import all_world_sizes, device, multi_world_sizes, run_ranks

SHARDED = ShardingPolicy(replicate_below=0)
POLICIES = {
    "default": ShardingPolicy(),
    "sharded": SHARDED,
    "gathered": ShardingPolicy(rules={"*": Gather()}),
    "replicated": ShardingPolicy(rules={"*": Replicate()}),
}


def every_policy(test: Callable[..., None]) -> Any:
    return all_world_sizes(pytest.mark.parametrize("policy", POLICIES)(test))


class Model(nn.Module):
    """A bit of everything; ``seen`` is what its own parameter was in the last forward."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 7), nn.Linear(7, 5)
        self.tied = nn.Linear(7, 5)
        self.tied.weight = self.down.weight
        self.conv = nn.Conv1d(1, 2, 1)
        self.lstm = nn.LSTM(5, 5)
        self.scale = nn.Parameter(torch.ones(5))
        self.register_buffer("offset", torch.ones(5))
        self.dropout = nn.Dropout(0.5)
        self.friend = [self.up]  # a reference that nn.Module does not know of
        self.seen: list[tuple[type, bool]] = []

    def forward(self, x: torch.Tensor, *, twice: bool = False) -> torch.Tensor:
        self.seen = [(type(self.scale), isinstance(self.scale, nn.Parameter))]
        x = torch.tanh(self.down(torch.tanh(self.friend[0](x)))) * self.scale + self.offset
        x = self.conv(x.unsqueeze(1)).mean(1) + self.tied(self.up(x))
        return self.lstm(x)[0] * (2 if twice else 1)


def _model() -> Model:
    torch.manual_seed(0)
    return Model().to(device(), torch.float64)  # cuDNN has no backward in eval


def _input() -> torch.Tensor:
    generator = torch.Generator().manual_seed(dist.get_rank())
    return torch.randn(3, 5, generator=generator, dtype=torch.float64).to(device())


def _check_identity(policy: ShardingPolicy) -> None:
    model = _model()
    calls: list[str] = []
    model.up.register_forward_hook(lambda *_: calls.append("forward"))
    model.up.register_full_backward_hook(lambda *_: calls.append("backward"))
    before = dict(model.named_modules())
    types = {name: type(module) for name, module in before.items()}
    signatures = {name: inspect.signature(module.forward) for name, module in before.items()}
    texts = {name: repr(module) for name, module in before.items()}
    keys, names = list(model.state_dict()), [name for name, _ in model.named_parameters()]
    wrapped = RotatedTensorParallel(model, policy=policy)
    assert wrapped.module is model
    assert wrapped.get_submodule("up") is before["up"]
    assert list(wrapped.state_dict()) == keys
    assert [name for name, _ in wrapped.named_parameters()] == names
    for name, module in model.named_modules():
        assert module is before[name]
        assert isinstance(module, types[name])
        assert type(module).__name__ == types[name].__name__
        assert type(module).__qualname__ == types[name].__qualname__
        assert type(module).__module__ == types[name].__module__
        assert type(module).__doc__ == types[name].__doc__
        assert inspect.signature(module.forward) == signatures[name]
        if not hasattr(module, "weight"):  # others may add how they are sharded
            assert "\n" in texts[name] or repr(module) == texts[name]
    assert model.down.weight is model.tied.weight
    assert model.friend[0] is model.up
    if policy is SHARDED:
        assert f"Rotate(dim=0), 1/{dist.get_world_size()}" in repr(model.up)
    mean_square(wrapped(_input().requires_grad_(), twice=True)).backward()
    assert calls == ["forward", "forward", "backward", "backward"]


@every_policy
def test_objects_types_hooks_names_and_signatures_survive(world_size: int, policy: str) -> None:
    run_ranks(world_size, _check_identity, POLICIES[policy])


def _check_reads(policy: ShardingPolicy) -> None:
    wrapped = RotatedTensorParallel(_model(), policy=policy)
    for parameter in (wrapped.scale, wrapped.up.weight, wrapped.lstm.weight_ih_l0):
        assert isinstance(parameter, DTensor)
        assert isinstance(parameter, nn.Parameter)
    wrapped(_input())
    assert wrapped.module.seen == [(torch.Tensor, False)]
    assert isinstance(wrapped.scale, DTensor)
    assert wrapped.scale is dict(wrapped.named_parameters())["scale"]
    with pytest.raises(AttributeError, match="nothing"):
        _ = wrapped.up.nothing


@every_policy
def test_parameters_are_plain_inside_forward_and_dtensors_outside(
    world_size: int, policy: str
) -> None:
    run_ranks(world_size, _check_reads, POLICIES[policy])


def _train(model: nn.Module, x: torch.Tensor, steps: int) -> None:
    optimizer = sgd(model.parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        mean_square(model(x)).backward()
        optimizer.step()


def _check_deepcopy(policy: ShardingPolicy) -> None:
    dense, model = _model(), _model()
    dense_copy = copy.deepcopy(dense)
    dense_copy.lstm.flatten_parameters()  # cuDNN warns of a copy's weights otherwise
    wrapped = RotatedTensorParallel(model, policy=policy)
    clone = copy.deepcopy(wrapped)
    for (name, one), (_, other) in zip(wrapped.named_modules(), clone.named_modules(), strict=True):
        assert one is not other
        assert type(one) is type(other), name
        assert isinstance(other, nn.Linear) == isinstance(one, nn.Linear)
    assert clone.down.weight is clone.tied.weight
    assert clone.module.friend[0] is clone.up
    assert all(parameter.is_leaf for parameter in clone.parameters())
    # Both train, the original first, then the copy by itself.
    parts = [torch.empty_like(_input()) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, _input())
    # [time, features] is unbatched for an LSTM: ranks must have the same input.
    x = parts[0]
    _train(wrapped, x, 2)
    _train(dense, x, 2)
    compare_weights(dense, wrapped)
    compare_weights(dense_copy, clone)
    _train(clone, x, 3)
    _train(dense_copy, x, 3)
    compare_gradients(dense_copy, clone)
    compare_weights(dense_copy, clone)
    compare_weights(dense, wrapped)
    inner = copy.deepcopy(wrapped.up)
    torch.testing.assert_close(inner(x), wrapped.up(x))
    shallow = copy.copy(wrapped.up)
    torch.testing.assert_close(shallow(x), wrapped.up(x))


@every_policy
def test_a_deepcopy_trains_on_its_own(world_size: int, policy: str) -> None:
    run_ranks(world_size, _check_deepcopy, POLICIES[policy])


def _check_pickle(policy: ShardingPolicy) -> None:
    wrapped = RotatedTensorParallel(_model(), policy=policy)
    for module in (wrapped.up, wrapped.conv):
        again = pickle.loads(pickle.dumps(module))
        assert type(again) is type(module)
        for name, parameter in module.named_parameters():
            assert torch.equal(full(again.get_parameter(name)), full(parameter))


@every_policy
def test_an_adopted_module_can_be_pickled_where_its_ring_lives(
    world_size: int, policy: str
) -> None:
    run_ranks(world_size, _check_pickle, POLICIES[policy])


def _check_attributes(policy: ShardingPolicy) -> None:
    wrapped = RotatedTensorParallel(_model(), policy=policy)
    x = _input()
    expected = wrapped(x)
    # Deleted, and put back.
    scale = wrapped.module.scale
    del wrapped.module.scale
    assert not hasattr(wrapped.module, "scale")
    with pytest.raises(AttributeError):
        wrapped(x)
    wrapped.module.scale = scale
    assert wrapped.scale is scale
    torch.testing.assert_close(wrapped(x), expected)
    # A plain tensor in the place of a parameter.
    del wrapped.module.scale
    wrapped.module.scale = torch.ones(5, dtype=x.dtype, device=x.device)
    torch.testing.assert_close(wrapped(x), expected)
    del wrapped.module.scale
    wrapped.module.scale = scale
    # None where a bias was, and the bias again.
    bias = wrapped.conv.bias
    wrapped.conv.bias = None
    wrapped(x)
    wrapped.conv.bias = bias
    torch.testing.assert_close(wrapped(x), expected)
    with pytest.raises(TypeError, match="cannot assign"):
        wrapped.conv.bias = 3
    # Buffers, modes, and flags.
    wrapped.offset.zero_()
    assert not torch.equal(wrapped(x), expected)
    wrapped.offset.fill_(1)
    wrapped.train()
    assert all(module.training for module in wrapped.modules())
    wrapped.eval()
    assert not any(module.training for module in wrapped.modules())
    wrapped.requires_grad_(False)
    assert not wrapped(x).requires_grad
    assert not any(parameter.requires_grad for parameter in wrapped.up.parameters())


@every_policy
def test_attributes_can_be_deleted_set_and_replaced(world_size: int, policy: str) -> None:
    run_ranks(world_size, _check_attributes, POLICIES[policy])


class Collides(nn.Module):
    """Names that an adopted module might want for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.adoption = nn.Linear(5, 5)
        self.ring = nn.Parameter(torch.ones(5))
        self.frame = self.strategies = self.fqn = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.adoption(x) * self.ring + self.frame


def _check_names() -> None:
    wrapped = RotatedTensorParallel(Collides().to(device(), torch.float64), policy=SHARDED)
    mean_square(wrapped(_input())).backward()
    assert all(parameter.grad is not None for parameter in wrapped.parameters())


@multi_world_sizes
def test_attributes_of_any_name_are_the_users(world_size: int) -> None:
    run_ranks(world_size, _check_names)


def _check_derived() -> None:
    layers = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))
    wrapped = RotatedTensorParallel(layers.to(device(), torch.float64), policy=SHARDED)
    x = _input()
    # Slices are made by the class, which has been changed.
    torch.testing.assert_close(layers[1:](layers[:1](x)), wrapped(x))
    fresh = type(layers[0])(5, 3, device=device(), dtype=torch.float64)
    assert isinstance(fresh.weight, nn.Parameter)
    assert fresh(x).shape == (3, 3)
    assert "Rotate" not in repr(fresh)
    assert isinstance(copy.deepcopy(fresh), nn.Linear)
    lstm = RotatedTensorParallel(nn.LSTM(5, 4).to(device(), torch.float64), policy=SHARDED)
    assert type(lstm.module)(5, 4)(torch.zeros(2, 5))[0].shape == (2, 4)


@multi_world_sizes
def test_new_instances_of_an_adopted_class_are_ordinary_modules(world_size: int) -> None:
    run_ranks(world_size, _check_derived)


def _check_untouched() -> None:
    model = nn.Sequential(nn.Linear(5, 5), nn.Sequential(nn.Linear(5, 5), nn.ReLU()))
    model.to(device(), torch.float64)
    wrapped = RotatedTensorParallel(
        model, policy=ShardingPolicy(rules={"1": Ignore()}, replicate_below=0)
    )
    assert type(model[1]) is nn.Sequential
    assert type(model[1][0]) is nn.Linear
    assert type(model[1][0].weight) is nn.Parameter
    mean_square(wrapped(_input())).backward()
    assert isinstance(model[0].weight.grad, DTensor)
    assert type(model[1][0].weight.grad) is torch.Tensor


@multi_world_sizes
def test_modules_without_managed_parameters_are_left_alone(world_size: int) -> None:
    run_ranks(world_size, _check_untouched)


def _check_script() -> None:
    scripted: Any = torch.jit.trace(nn.Linear(5, 5), torch.zeros(2, 5))
    with pytest.raises(TypeError, match=r"0\.weight belongs to a TorchScript module"):
        RotatedTensorParallel(nn.Sequential(scripted))


@multi_world_sizes
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_torchscript_modules_are_refused_by_name(world_size: int) -> None:
    run_ranks(world_size, _check_script)
