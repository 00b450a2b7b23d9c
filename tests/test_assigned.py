"""Assigning ``.data`` of a wrapped parameter would do nothing: an error at its next use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import pytest

if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))

import torch
import torch.distributed as dist
from torch import nn

from rtp_wrap import Gather, RotatedTensorParallel, ShardingPolicy
from tests.parity import mean_square
from tests.ranks import all_world_sizes, device, run_ranks

LIMIT = 60.0
POLICY = ShardingPolicy(rules={"gathered": Gather()}, replicate_below=8)
ROTATED, GATHERED, REPLICATED = "rotated.weight", "gathered.weight", "norm.bias"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rotated = nn.Linear(6, 8, bias=False)
        self.norm = nn.LayerNorm(4)
        self.gathered = nn.Linear(8, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.gathered(self.rotated(x)))


def _wrap() -> Any:
    torch.manual_seed(0)
    return RotatedTensorParallel(Net().to(device(), torch.float64), policy=POLICY)


def _x(model: nn.Module) -> torch.Tensor:
    return torch.randn(4, 6, device=device()).to(next(model.parameters()).dtype)


def _halve(model: Any, fqn: str) -> None:
    parameter = model.get_parameter(fqn)
    parameter.data = parameter.data * 0.5


@contextmanager
def _raises(fqn: str) -> Iterator[None]:
    with pytest.raises(RuntimeError, match=rf"^{fqn}: its \.data was replaced .* in place: "):
        yield


def _check_uses() -> None:
    for fqn in (ROTATED, GATHERED, REPLICATED):
        model = _wrap()
        _halve(model, fqn)
        with _raises(fqn):
            model(_x(model))
        with _raises(fqn):
            model.state_dict()
        model = _wrap()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        mean_square(model(_x(model))).backward()
        for _ in range(2):  # the second one's storage may be where the parameter's own was
            _halve(model, fqn)
        with _raises(fqn):
            optimizer.step()
        model = _wrap()
        model.get_parameter(fqn).data = torch.ones(model.get_parameter(fqn).shape, device=device())
        with _raises(fqn):
            model(_x(model))


@all_world_sizes
def test_a_parameter_whose_data_was_assigned_is_named_where_it_is_used(world_size: int) -> None:
    run_ranks(world_size, _check_uses, timeout=LIMIT)


def _swapped(model: Any) -> Any:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.load_state_dict(model.state_dict())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    model(_x(model))
    return model


def _replaced(model: Any) -> Any:
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    return model


#: What gives a model other parameters, or the old ones other contents, as it may.
REMAKES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": deepcopy,
    "dtype": lambda model: model.float(),
    "same dtype": lambda model: model.double(),
    "assign": _replaced,
    "swap": _swapped,
}


def _check_remade() -> None:
    for name, remake in REMAKES.items():
        model = remake(_wrap())
        mean_square(model(_x(model))).backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        for fqn in (ROTATED, GATHERED, REPLICATED):
            model = remake(_wrap())
            _halve(model, fqn)
            with pytest.raises(RuntimeError, match=rf"^{fqn}: its \.data was replaced"):
                print(f"after {name}", model(_x(model)))


@all_world_sizes
def test_copies_and_conversions_are_no_assignments_and_do_not_hide_any(world_size: int) -> None:
    run_ranks(world_size, _check_remade, timeout=LIMIT)


def _check_in_place() -> None:
    """What the error advises does what the assignment was to do."""
    model, source = _wrap(), _wrap()
    expected = {fqn: p.full_tensor() * 0.5 for fqn, p in model.named_parameters()}
    for fqn, parameter in model.named_parameters():
        parameter.data.mul_(3)
        with torch.no_grad():
            parameter.lerp_(source.get_parameter(fqn), 0.5).div_(2)
        parameter.data.copy_(parameter.data * 0.5)
    for fqn, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.full_tensor(), expected[fqn])
    x = _x(model)
    with torch.no_grad():
        plain = x @ expected[ROTATED].T
        torch.testing.assert_close(model.rotated(x), plain)
        torch.testing.assert_close(model.gathered(plain), plain @ expected[GATHERED].T)
    assert dist.get_world_size() == model.plan.world_size


@all_world_sizes
def test_writing_in_place_is_the_remedy(world_size: int) -> None:
    run_ranks(world_size, _check_in_place, timeout=LIMIT)
