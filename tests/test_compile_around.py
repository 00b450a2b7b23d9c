"""Compiled blocks and what is around them: callers, settings, names and plans, other threads."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))

import rtp_wrap
from rtp_wrap import Gather, RotatedTensorParallel, ShardingPolicy
from tests.parity import mean_square
from tests.ranks import device, run_ranks
from tests.rotated import COMPILERS_WARNINGS
from tests.test_compile import (
    POLICY,
    WIDTH,
    Block,
    Model,
    Repeating,
    compile_and_assign,
    compile_in_place,
    pair,
    part,
    plain,
    train,
)

pytestmark = COMPILERS_WARNINGS


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


def only_inferring(model: nn.Module, x: torch.Tensor) -> None:
    with torch.inference_mode():
        y = model(x)
    assert not y.requires_grad


def without_gradients(model: nn.Module, x: torch.Tensor) -> None:
    with torch.no_grad():
        y = model(x)
    mean_square(y).backward()


def _check_enabling() -> None:
    policy = ShardingPolicy(rules={"*.scale": Gather()}, replicate_below=2 * WIDTH + 1)
    for compiles in (True, False):
        dense, wrapped = pair(functools.partial(Model, Enabling, 1), policy=policy)
        if compiles:
            compile_in_place(wrapped)
            train(dense, wrapped, only_inferring, 1)
        for pass_ in (without_gradients, plain):
            train(dense, wrapped, pass_, 1, f"{pass_.__name__}, compiled={compiles}")


def test_a_block_may_enable_gradients_where_its_caller_does_not() -> None:
    run_ranks(2, _check_enabling)


RECOMPUTING = {
    "activation_memory_budget": 0.5,
    "aggressive_recomputation": True,
    "ban_recompute_not_in_allowlist": False,
}


def _check_recomputing() -> None:
    dense, wrapped = pair(functools.partial(Model, Block, 2), before=compile_in_place)
    x = part(0, dist.get_rank())
    for setting, value in RECOMPUTING.items():
        with (
            torch._functorch.config.patch(setting, value),
            pytest.raises(RuntimeError, match=rf"blocks.0 is compiled under .*{setting} = {value}"),
        ):
            wrapped(x)
    train(dense, wrapped, steps=1)


def test_settings_that_have_the_compiler_recompute_layers_are_refused() -> None:
    run_ranks(2, _check_recomputing)


def _check_names() -> None:
    torch._dynamo.reset()
    dense = Model(Repeating, 1).to(device(), torch.float64)
    compiled = deepcopy(dense)
    compile_and_assign(compiled)
    names = list(compiled.state_dict())
    assert "blocks.0._orig_mod.side.weight" in names
    x = part(0, dist.get_rank())
    plan, other = (
        rtp_wrap.plan(model, world_size=dist.get_world_size(), policy=POLICY, example_inputs=x)
        for model in (dense, compiled)
    )
    assert other == plan
    wrapped = RotatedTensorParallel(compiled, plan=plan)
    assert list(wrapped.state_dict()) == names  # as everywhere else
    torch.testing.assert_close(wrapped(x), dense(x))
    with pytest.raises(TypeError, match=r"^blocks.0.layer: input is torch.float32"):
        wrapped.blocks[0](x.float())


def test_plans_and_errors_name_what_is_compiled_as_the_model_does() -> None:
    run_ranks(2, _check_names)


class Pausing:
    """A backend whose graphs wait, in another thread than its own, until they may go on."""

    def __init__(self) -> None:
        self.paused, self.may_go_on = threading.Event(), threading.Event()
        self._thread = threading.current_thread()

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            if threading.current_thread() is not self._thread:
                self.paused.set()
                assert self.may_go_on.wait(LIMIT)
            return graph(*args)

        return run


#: Seconds, of a wait that others end.
LIMIT = 60.0


def _check_threads() -> None:
    pausing = Pausing()
    in_place = functools.partial(compile_in_place, backend=pausing)
    dense, wrapped = pair(functools.partial(Model, Repeating, 1), before=in_place)
    x = part(0, dist.get_rank())
    wrapped(x)
    outputs = []
    other = threading.Thread(target=lambda: outputs.append(wrapped(x)), daemon=True)
    other.start()
    assert pausing.paused.wait(LIMIT)
    with pytest.raises(RuntimeError, match=r"^the model was called while another thread is in a"):
        wrapped(x)
    with pytest.raises(RuntimeError, match=r"^blocks.0 was called while another thread is in a"):
        wrapped.blocks[0](x)
    pausing.may_go_on.set()
    other.join(LIMIT)
    torch.testing.assert_close(outputs, [dense(x)])
    assert all(vars(each).get("_captured") is None for each in wrapped.modules())
    train(dense, wrapped, steps=1)


def test_a_second_thread_in_a_forward_is_an_error_there() -> None:
    run_ranks(2, _check_threads)


def _check_export() -> None:
    x = part(0, dist.get_rank())
    dense, wrapped = pair(functools.partial(Model, Block, 1))
    for model in (wrapped, wrapped.module):
        with pytest.raises(RuntimeError, match="the model is wrapped, and its shards cannot be"):
            torch.export.export(model, (x,))
    train(dense, wrapped, steps=1)


def test_an_export_is_refused() -> None:
    run_ranks(2, _check_export)


def _check_jit_trace() -> None:
    model = RotatedTensorParallel(nn.Sequential(nn.Linear(6, 6)).to(device()))
    x = torch.randn(2, 6, device=device())
    with pytest.raises(RuntimeError, match="the model is wrapped, and its shards cannot be traced"):
        torch.jit.trace(model, (x,))
    model(x).sum().backward()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit itself
def test_a_trace_for_torchscript_is_refused() -> None:
    run_ranks(2, _check_jit_trace)
