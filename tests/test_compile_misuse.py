"""Compiled blocks where a caller, a setting or another thread gets in their way."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))

from rtp_wrap import Gather, ShardingPolicy
from tests.parity import mean_square
from tests.ranks import run_ranks
from tests.test_compile import WIDTH, Model, compile_in_place, pair, plain, train

# What the compiler's own code is warned of, and hides from users.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning"),
]


class Enabling(nn.Module):
    """Wants gradients of its last part, whatever its caller says."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.ones(3, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.up(x))
        with torch.enable_grad():
            return self.down(x * self.scale)


def without_gradients(model: nn.Module, x: torch.Tensor) -> None:
    with torch.no_grad():
        y = model(x)
    mean_square(y).backward()


def _check_enabling() -> None:
    policy = ShardingPolicy(rules={"*.scale": Gather()}, replicate_below=2 * WIDTH + 1)
    for compiles in (True, False):
        dense, wrapped = pair(functools.partial(Model, Enabling, 2), policy=policy)
        if compiles:
            compile_in_place(wrapped)
        for pass_ in (without_gradients, plain):
            train(dense, wrapped, pass_, 1, f"{pass_.__name__}, compiled={compiles}")


def test_a_block_may_enable_gradients_where_its_caller_does_not() -> None:
    run_ranks(2, _check_enabling)
