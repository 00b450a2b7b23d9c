"""What wrapping would leave behind with the parameters it replaces: refused, and nothing done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))

import torch
from torch import nn

from rtp_wrap import Ignore, RotatedTensorParallel
from rtp_wrap.assign import assign
from rtp_wrap.policy import ShardingPolicy
from rtp_wrap.verify import check_parameters
from tests.parity import mean_square
from tests.ranks import device, multi_world_sizes, run_ranks


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * self.scale


def _hidden(model: Net) -> None:
    other = nn.Linear(4, 4)
    other.weight = model.inner.weight
    model.others = [nn.Sequential(other)]


#: What somebody may keep, and where the error says that it is.
KEPT: dict[str, Callable[[Net], object]] = {
    r"inner\.list\[1\] is the parameter inner\.bias ": lambda model: setattr(
        model.inner, "list", [0, model.inner.bias]
    ),
    r"table\['a'\]\[0\]\[0\] is the parameter scale ": lambda model: setattr(
        model, "table", {"a": ({model.scale},)}
    ),
    r"direct is the parameter inner\.weight ": lambda model: object.__setattr__(
        model, "direct", model.inner.weight
    ),
    r"others\[0\]\.0\.weight is the parameter inner\.weight ": _hidden,
    r"_buffers\['b'\] is the parameter scale ": lambda model: model.register_buffer(
        "b", model.scale
    ),
}
BEHIND: dict[str, Callable[[Net], object]] = {
    **KEPT,
    "inner.weight has hooks, .* after wrapping": lambda model: model.inner.weight.register_hook(
        lambda gradient: gradient * 0
    ),
    "scale has hooks, .* after wrapping": lambda model: (
        model.scale.register_post_accumulate_grad_hook(lambda parameter: None)
    ),
    r"inner.bias has a gradient, .* zero_grad\(\)": lambda model: mean_square(
        model.inner.bias
    ).backward(),
}


def _check_refused() -> None:
    for message, change in BEHIND.items():
        model = Net().to(device())
        change(model)
        before = {fqn: (p, p.grad) for fqn, p in model.named_parameters()}
        with pytest.raises(ValueError, match=f"^{message}"):
            RotatedTensorParallel(model)
        assert {fqn: (p, p.grad) for fqn, p in model.named_parameters()} == before
        assert type(model) is Net
        assert type(model.inner) is nn.Linear
        RotatedTensorParallel(model, policy={"*": Ignore()})


@multi_world_sizes
def test_what_wrapping_would_lose_is_refused_before_anything_is_changed(world_size: int) -> None:
    run_ranks(world_size, _check_refused, timeout=30.0)


class Keeps(nn.Module):
    """Has a list of everything that is no second reference to a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 4, 2)  # _flat_weights
        self.listed = nn.ParameterList([nn.Parameter(torch.randn(4))])
        self.named = nn.ParameterDict({"a": nn.Parameter(torch.randn(4))})
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.layers = [self.normed, self.listed, {"lstm": (self.lstm,)}]
        self.constants = [torch.ones(4), nn.Parameter(torch.zeros(4), requires_grad=False)]
        self.parent = [nn.Sequential(self)]
        self.itself: list[Any] = [self.layers]
        self.itself.append(self.itself)


def test_what_a_model_may_keep_is_not_refused() -> None:
    for model in (Keeps(), nn.Sequential(Keeps())):
        check_parameters(model, assign(model, ShardingPolicy()))
