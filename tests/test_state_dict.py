"""Checkpoints: sharded or full, saved at one world size and loaded at another."""

from __future__ import annotations

import io
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor

from rtp_wrap import Gather, Replicate, RotatedTensorParallel, ShardingPolicy
from tests.parity import FP64, compare_weights, full
from tests.ranks import WORLD_SIZES, all_world_sizes, device, run_ranks

POLICY = ShardingPolicy(rules={"embed": Gather(), "*.bias": Replicate()}, replicate_below=0)
#: Saved at the first world size, loaded at the second.
PAIRS = [
    (n, m) for n, m in [(1, 3), (2, 2), (2, 3), (3, 4), (4, 1)] if {n, m} <= set(WORLD_SIZES)
] or [(WORLD_SIZES[0], WORLD_SIZES[0])]
SAMPLES = 12  # divisible by all world sizes: the whole batch is the same everywhere


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.first = nn.Linear(6, 7)
        self.head = nn.Linear(6, 11, bias=False)
        self.second = nn.Linear(7, 6)
        self.head.weight = self.embed.weight  # tied
        self.register_buffer("scale", torch.tensor(2.0))
        self.register_buffer("steps", torch.tensor(0), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.second(torch.tanh(self.first(self.embed(ids))))
        return self.head(x) * self.scale


def _pair(seed: int = 0) -> tuple[nn.Module, Any]:
    torch.manual_seed(seed)
    dense = Net().to(device(), torch.float64)
    return dense, RotatedTensorParallel(deepcopy(dense), policy=POLICY)


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    ids = torch.arange(SAMPLES).add(step).remainder(11).to(device())
    if isinstance(model, RotatedTensorParallel):
        ids = ids.chunk(dist.get_world_size())[dist.get_rank()]
    optimizer.zero_grad()
    model(ids).square().mean().backward()
    optimizer.step()


def _save(path: Path) -> None:
    _, wrapped = _pair()
    optimizer = _adamw(wrapped)
    for step in range(2):
        _step(wrapped, optimizer, step)
    # Gradients exist here: torch would leave out the state of an optimizer that has not stepped.
    model_state, optimizer_state = get_state_dict(wrapped, optimizer)
    assert all(optimizer_state["state"].values())
    assert {"exp_avg", "exp_avg_sq"} <= set(optimizer_state["state"]["first.weight"])
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=path)


def _load(path: Path) -> None:
    dense, _ = _pair()
    dense_optimizer = _adamw(dense)
    for step in range(2):
        _step(dense, dense_optimizer, step)
    _, wrapped = _pair(seed=1)
    optimizer = _adamw(wrapped)
    model_state, optimizer_state = get_state_dict(wrapped, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=path)
    set_state_dict(
        wrapped,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    compare_weights(dense, wrapped)
    _step(dense, dense_optimizer, 2)  # right only if the moments were loaded as well
    _step(wrapped, optimizer, 2)
    compare_weights(dense, wrapped)


@pytest.mark.parametrize(("saved", "loaded"), PAIRS)
def test_a_checkpoint_saved_at_n_loads_at_m(saved: int, loaded: int, tmp_path: Path) -> None:
    run_ranks(saved, _save, tmp_path / "checkpoint")
    run_ranks(loaded, _load, tmp_path / "checkpoint")


def _full() -> None:
    options = StateDictOptions(full_state_dict=True)
    dense, wrapped = _pair()
    dense_optimizer, optimizer = _adamw(dense), _adamw(wrapped)
    for step in range(2):
        _step(dense, dense_optimizer, step)
        _step(wrapped, optimizer, step)
    model_state = get_model_state_dict(wrapped, options=options)
    optimizer_state = deepcopy(get_optimizer_state_dict(wrapped, optimizer, options=options))
    expected = dense.state_dict()
    assert list(model_state) == list(expected)
    for fqn, value in expected.items():
        assert not isinstance(model_state[fqn], DTensor)
        torch.testing.assert_close(model_state[fqn], value, **FP64)
    # The dense model takes it, and the wrapped one takes the dense model's.
    assert not dense.load_state_dict(model_state).missing_keys
    _, other = _pair(seed=2)
    other_optimizer = _adamw(other)
    broadcast = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    first = dist.get_rank() == 0
    set_model_state_dict(other, expected if first else {}, options=broadcast)
    compare_weights(dense, other)
    set_optimizer_state_dict(other, other_optimizer, optimizer_state, options=options)
    for each, its_optimizer in (
        (dense, dense_optimizer),
        (wrapped, optimizer),
        (other, other_optimizer),
    ):
        _step(each, its_optimizer, 3)
    compare_weights(dense, wrapped)
    compare_weights(dense, other)


@all_world_sizes
def test_full_state_dicts_are_the_dense_models_and_load_back(world_size: int) -> None:
    run_ranks(world_size, _full)


def _plain() -> None:
    dense, wrapped = _pair()
    state = {fqn: value.clone() for fqn, value in wrapped.state_dict().items()}
    assert list(state) == list(dense.state_dict())
    assert "steps" not in state
    for fqn, value in dense.state_dict().items():
        torch.testing.assert_close(full(state[fqn]), value, rtol=0, atol=0)
        assert isinstance(state[fqn], DTensor) == (fqn != "scale")
    optimizer = _adamw(wrapped)
    parameters = list(wrapped.parameters())
    addresses = [p._local_tensor.data_ptr() for p in parameters]
    _step(wrapped, optimizer, 0)
    result = wrapped.load_state_dict(state)
    assert not result.missing_keys
    assert not result.unexpected_keys
    compare_weights(dense, wrapped, {"rtol": 0.0, "atol": 0.0})
    assert all(a is b for a, b in zip(wrapped.parameters(), parameters, strict=True))
    assert [p._local_tensor.data_ptr() for p in parameters] == addresses
    assert wrapped.head.weight is wrapped.embed.weight

    del state["first.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*first\.weight"):
        wrapped.load_state_dict(state)
    assert wrapped.load_state_dict(state, strict=False).missing_keys == ["first.weight"]
    state["extra"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r"(?s)Unexpected key.*extra"):
        wrapped.load_state_dict(state)
    state["second.weight"] = state["second.bias"]
    with pytest.raises(RuntimeError, match=r"size mismatch for second\.weight"):
        wrapped.load_state_dict(state, strict=False)


@all_world_sizes
def test_state_dict_loads_back_in_place_and_strictly(world_size: int) -> None:
    run_ranks(world_size, _plain)


def _parameters_in_files(transport: str) -> None:
    """What is remembered of a parameter in use is nothing that a file has, or has to be trusted."""
    layer = nn.Linear(6, 8, device=device(), dtype=torch.float64)
    policy = ShardingPolicy(replicate_below=0, transport=transport)
    wrapped = RotatedTensorParallel(layer, policy=policy)
    wrapped(torch.randn(2, 6, device=device(), dtype=torch.float64)).sum().backward()
    saved = io.BytesIO()
    torch.save(wrapped.state_dict(keep_vars=True), saved)
    saved.seek(0)
    loaded = torch.load(saved, weights_only=True)
    for name, parameter in wrapped.named_parameters():
        assert torch.equal(loaded[name].to_local(), parameter.to_local())  # type: ignore[attr-defined]


@all_world_sizes
@pytest.mark.parametrize("transport", ["ring", "auto"])
def test_parameters_in_use_are_saved_as_weights_only(world_size: int, transport: str) -> None:
    run_ranks(world_size, _parameters_in_files, transport)


def _options() -> None:
    _, wrapped = _pair()
    prefixed = wrapped.state_dict(prefix="model.")
    assert all(fqn.startswith("model.") for fqn in prefixed)
    collected: dict[str, torch.Tensor] = {}
    wrapped.state_dict(destination=collected)
    assert collected.keys() == wrapped.state_dict().keys()
    assert not wrapped.state_dict()["first.weight"].requires_grad
    assert wrapped.state_dict(keep_vars=True)["first.weight"] is wrapped.first.weight


@all_world_sizes
def test_state_dict_takes_its_options(world_size: int) -> None:
    run_ranks(world_size, _options)


def _optimizer_state() -> None:
    """`optimizer.state_dict` of torch itself, at one world size."""
    dense, wrapped = _pair()
    pairs = [(model, _adamw(model)) for model in (dense, wrapped)]
    for step in range(2):
        for model, optimizer in pairs:
            _step(model, optimizer, step)
    again = _adamw(wrapped)
    again.load_state_dict(deepcopy(pairs[1][1].state_dict()))
    _step(dense, pairs[0][1], 2)
    _step(wrapped, again, 2)
    compare_weights(dense, wrapped)


@all_world_sizes
def test_an_optimizers_own_state_dict_loads_back(world_size: int) -> None:
    run_ranks(world_size, _optimizer_state)


def _converted() -> None:
    dense, wrapped = _pair()
    for convert in ("half", "float", "bfloat16", "double"):
        assert getattr(wrapped, convert)() is wrapped
        getattr(dense, convert)()
        compare_weights(dense, wrapped, {"rtol": 0.0, "atol": 0.0})
        assert {v.dtype for v in wrapped.state_dict().values()} == {
            v.dtype for v in dense.state_dict().values()
        }
    wrapped.to(device())
    optimizers = [_adamw(model) for model in (dense, wrapped)]
    for model, optimizer in zip((dense, wrapped), optimizers, strict=True):
        _step(model, optimizer, 0)
    compare_weights(dense, wrapped)


@all_world_sizes
def test_conversions_keep_every_shard_and_the_model_trains_on(world_size: int) -> None:
    run_ranks(world_size, _converted)
