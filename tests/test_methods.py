"""Methods besides ``forward`` that read a wrapped model's own parameters."""

from __future__ import annotations

import inspect
import pickle
from copy import deepcopy
from typing import Any

import pytest

if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))

import torch
import torch.distributed as dist
from torch import nn

from rtp_wrap import (
    Gather,
    MixedPrecisionPolicy,
    RotatedTensorParallel,
    ShardingPolicy,
    register_forward_method,
)
from tests.parity import compare_gradients, compare_weights, mean_square, sgd
from tests.ranks import all_world_sizes, device, multi_world_sizes, run_ranks


class Features(nn.Module):
    """As vision transformers have it: a token of its own in front of what a layer makes."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 6))
        self.project = nn.Linear(5, 6)
        self.scale = nn.Parameter(torch.randn(6))
        self.patched = self.describe

    def forward_features(self, x: torch.Tensor, scaled: bool = True) -> torch.Tensor:
        y = torch.cat([self.token.expand(len(x), -1, -1), self.project(x)], 1)
        return y * self.scale if scaled else y

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_features(x).mean(1)

    def describe(self) -> str:
        return "features"


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Features()
        self.shift = nn.Parameter(torch.randn(6))
        self.act = nn.ReLU()

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + self.shift

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.encode(x))


#: The token is gathered, the scale and the shift replicated, the layer's weight rotated.
POLICY = ShardingPolicy(rules={"inner.token": Gather(dim=2)}, replicate_below=8)


def _pair() -> tuple[Any, Any]:
    torch.manual_seed(0)
    dense = Model().to(device(), torch.float64)
    wrapped = RotatedTensorParallel(deepcopy(dense), policy=POLICY)
    with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"):
        wrapped.encode(_batch()[0])
    register_forward_method(wrapped, "encode")
    register_forward_method(wrapped.inner, "forward_features")
    return dense, wrapped


def _batch() -> torch.Tensor:
    """Samples of all ranks."""
    return torch.randn(dist.get_world_size(), 2, 3, 5, dtype=torch.float64, device=device())


def _step(dense: Any, wrapped: Any, path: str) -> None:
    """One step of each, through the method ``path`` of the model or of a module in it."""
    x, (owner, _, method) = _batch(), path.rpartition(".")
    for model, part in ((dense, x.flatten(0, 1)), (wrapped, x[dist.get_rank()])):
        model.zero_grad()
        mean_square(getattr(model.get_submodule(owner), method)(part)).backward()
    compare_gradients(dense, wrapped, when=path)
    for model in (dense, wrapped):
        sgd(model.parameters()).step()
    compare_weights(dense, wrapped, when=path)


def _check_parity() -> None:
    dense, wrapped = _pair()
    for path in ("encode", "inner.forward_features", "forward", "encode"):
        _step(dense, wrapped, path)
    x = _batch()[0]
    with torch.no_grad():  # compared as after a forward
        torch.testing.assert_close(wrapped.encode(x), dense.encode(x))
    assert inspect.signature(wrapped.inner.forward_features) == inspect.signature(
        dense.inner.forward_features
    )


@all_world_sizes
def test_a_registered_method_trains_as_the_dense_models(world_size: int) -> None:
    run_ranks(world_size, _check_parity)


def _check_copies() -> None:
    dense, wrapped = _pair()
    for copy in (deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped.module))):
        theirs, path = deepcopy(dense), "inner.forward_features"
        _step(theirs, copy, path)  # the copy's weights are other ones then
        x = _batch()[0]
        torch.testing.assert_close(copy.encode(x), theirs.encode(x))
        torch.testing.assert_close(wrapped.encode(x), dense.encode(x))
        compare_weights(dense, wrapped)


@multi_world_sizes
def test_the_method_of_a_copy_reads_the_copys_parameters(world_size: int) -> None:
    run_ranks(world_size, _check_copies)


def _check_casts() -> None:
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float64)
    wrapped: Any = RotatedTensorParallel(Model().to(device()), mixed_precision=precision)
    register_forward_method(wrapped, "encode")
    register_forward_method(wrapped.inner, "forward_features")
    x = _batch()[0].float()
    assert wrapped.encode(x).dtype == wrapped(x).dtype == torch.float64
    assert wrapped.inner.forward_features(x).dtype == wrapped.inner(x).dtype == torch.bfloat16


@multi_world_sizes
def test_inputs_and_outputs_are_cast_as_a_forwards(world_size: int) -> None:
    run_ranks(world_size, _check_casts)


def _check_refusals() -> None:
    dense, wrapped = _pair()
    for module, name, message in (
        (dense, "encode", "^encode of a Model: it is no module of a wrapped model"),
        (wrapped.act, "forward", "^forward of a ReLU: it is no module of a wrapped model"),
        (wrapped, "decode", "^decode is no method of Model"),
        (wrapped.inner, "token", r"^inner\.token is no method of Features"),
        (wrapped.inner, "patched", r"^inner\.patched was set on the object"),
    ):
        with pytest.raises(ValueError, match=message):
            register_forward_method(module, name)
    register_forward_method(wrapped, "encode")  # once more
    register_forward_method(wrapped, "forward")
    _step(dense, wrapped, "encode")
    _step(dense, wrapped, "forward")


@multi_world_sizes
def test_what_is_no_method_of_a_wrapped_model_is_named(world_size: int) -> None:
    run_ranks(world_size, _check_refusals)
