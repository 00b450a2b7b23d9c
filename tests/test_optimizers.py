"""Stock optimizers, clipping, schedulers and gradient scaling train a wrapped model."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from functools import partial
from typing import Any

import pytest

if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from rtp_wrap import Gather, Replicate, RotatedTensorParallel, ShardingPolicy
from tests.data import batch, own_batch, whole_batch
from tests.parity import FP64, check_parity, compare_gradients, compare_weights, full
from tests.ranks import all_world_sizes, device, multi_world_sizes, run_ranks

#: Rotated weights, one gathered parameter and replicated ones; uneven sizes.
POLICY = ShardingPolicy(
    rules={"3.bias": Gather(), "*.bias": Replicate(), nn.LayerNorm: Replicate()}, replicate_below=0
)


def _build() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.LayerNorm(7), nn.Linear(7, 5))


def _pair(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, RotatedTensorParallel]:
    torch.manual_seed(0)
    dense = _build().to(device(), dtype)
    return dense, RotatedTensorParallel(deepcopy(dense), policy=POLICY)


OPTIMIZERS: dict[str, list[partial[torch.optim.Optimizer]]] = {
    "SGD": [
        partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1, **how)
        for how in ({"foreach": True}, {"foreach": False})  # torch has no fused one for DTensors
    ],
    "Adam": [
        partial(torch.optim.Adam, lr=0.01, amsgrad=True, weight_decay=0.1, **how)
        for how in ({"foreach": True}, {"foreach": False}, {"fused": True})
    ],
    "AdamW": [
        partial(torch.optim.AdamW, lr=0.01, **how)
        for how in ({"foreach": True}, {"foreach": False}, {"fused": True})
    ],
    "Adagrad": [partial(torch.optim.Adagrad, lr=0.01, **how) for how in ({"foreach": True}, {})],
    "RMSprop": [
        partial(torch.optim.RMSprop, lr=0.01, centered=True, momentum=0.9, **how)
        for how in ({"foreach": True}, {"foreach": False})
    ],
    "others": [
        partial(torch.optim.Adadelta, lr=0.1),
        partial(torch.optim.Adamax, lr=0.01),
        partial(torch.optim.NAdam, lr=0.01),
        partial(torch.optim.RAdam, lr=0.01),
        partial(torch.optim.ASGD, lr=0.01),
    ],
}


def _optimizers(name: str) -> None:
    for optimizer in OPTIMIZERS[name]:
        try:
            # Adam and its kin divide by the root of squares, which doubles relative errors of
            # small gradients a few times: six digits more than needed remain.
            tolerance = {"rtol": 1e-7, "atol": 1e-9}
            check_parity(_build, batch, optimizer=optimizer, policy=POLICY, tolerance=tolerance)
        except Exception as error:
            raise AssertionError(str(optimizer)) from error


@all_world_sizes
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_stock_optimizers_give_the_dense_weights(world_size: int, name: str) -> None:
    run_ranks(world_size, _optimizers, name)


def _state() -> None:
    """The optimizer's state is as sharded as the parameters."""
    _, wrapped = _pair()
    optimizer = torch.optim.AdamW(wrapped.parameters())
    wrapped(own_batch(0)).mean().backward()
    optimizer.step()
    for parameter in wrapped.parameters():
        moment, local = optimizer.state[parameter]["exp_avg"], parameter
        assert isinstance(moment, DTensor)
        assert isinstance(local, DTensor)
        assert moment.placements == local.placements
        assert moment._local_tensor.shape == local._local_tensor.shape


@all_world_sizes
def test_optimizer_state_is_sharded_like_its_parameter(world_size: int) -> None:
    run_ranks(world_size, _state)


def _lbfgs() -> None:
    """It flattens gradients, which torch refuses for uneven shards: these divide by 2, 3 and 4."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 12)).to(
        device(), torch.float64
    )
    wrapped = RotatedTensorParallel(deepcopy(dense), policy=ShardingPolicy(replicate_below=0))
    for step in range(2):
        for model, x in ((dense, whole_batch(step)), (wrapped, own_batch(step))):
            optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)

            def closure(
                model: nn.Module = model,
                x: torch.Tensor = x,
                optimizer: torch.optim.Optimizer = optimizer,
            ) -> Any:
                optimizer.zero_grad()
                loss = (model(x) - 0.5).square().mean()
                loss.backward()
                return loss

            optimizer.step(closure)
        compare_weights(dense, wrapped, {"rtol": 1e-7, "atol": 1e-9})


def _grouped(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    first, *rest = parameters
    return torch.optim.AdamW([{"params": [first], "lr": 0.1}, {"params": rest}], lr=0.01)


def _groups() -> None:
    check_parity(_build, batch, optimizer=_grouped, policy=POLICY)


@all_world_sizes
def test_parameter_groups_keep_their_settings(world_size: int) -> None:
    run_ranks(world_size, _groups)


def _clipping() -> None:
    for norm_type, foreach in ((2.0, None), (2.0, False), (1.0, None), (float("inf"), None)):
        if norm_type == float("inf") and dist.get_world_size() == 4:
            continue  # the last rank owns nothing of 5 rows, of which torch takes no maximum
        dense, wrapped = _pair()
        dense(whole_batch(0)).square().mean().backward()
        wrapped(own_batch(0)).square().mean().backward()
        clip = partial(
            torch.nn.utils.clip_grad_norm_, max_norm=0.1, norm_type=norm_type, foreach=foreach
        )
        expected, norm = clip(dense.parameters()), clip(wrapped.parameters())
        torch.testing.assert_close(full(norm), expected, **FP64)
        compare_gradients(dense, wrapped, FP64, f"norm {norm_type}")
        for model in (dense, wrapped):
            torch.nn.utils.clip_grad_value_(model.parameters(), 0.003)
        compare_gradients(dense, wrapped, FP64, "value")


@all_world_sizes
def test_clipping_is_that_of_the_dense_model(world_size: int) -> None:
    run_ranks(world_size, _clipping)


def _schedulers() -> None:
    for set_to_none in (True, False):
        pair = _pair()
        optimizers = [torch.optim.AdamW(model.parameters(), lr=0.1) for model in pair]
        schedulers = [
            torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=6)
            for optimizer in optimizers
        ]
        for step in range(4):
            for model, x, optimizer, scheduler in zip(
                pair, (whole_batch(step), own_batch(step)), optimizers, schedulers, strict=True
            ):
                model(x).square().mean().backward()
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad(set_to_none=set_to_none)
            for parameter in pair[1].parameters():
                assert (parameter.grad is None) == set_to_none
            compare_weights(*pair)


@all_world_sizes
def test_schedulers_and_both_kinds_of_zero_grad_work(world_size: int) -> None:
    run_ranks(world_size, _schedulers)


def _scaler(where: str) -> None:
    dense, wrapped = _pair(torch.float32)
    scaler = torch.amp.GradScaler(device().type, init_scale=1024.0, growth_interval=1000)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (dense, wrapped)]
    before = [p._local_tensor.clone() for p in wrapped.parameters()]  # type: ignore[attr-defined]
    last = dist.get_rank() == dist.get_world_size() - 1
    own = own_batch(0).float()
    loss = wrapped(own * float("inf") if last and where == "input" else own).square().mean()
    scaler.scale(loss).backward()
    if last and where == "gradient":  # in this rank's shard of one gradient alone
        gradients: list[Any] = [p.grad for p in wrapped.parameters()]
        shard = next(g._local_tensor for g in gradients if g._local_tensor.numel())
        shard.view(-1)[0] = float("inf")
    scaler.unscale_(optimizers[1])
    scaler.step(optimizers[1])
    scaler.update()
    assert scaler.get_scale() == 512.0, "this rank did not see the inf"
    for parameter, value in zip(wrapped.parameters(), before, strict=True):
        assert torch.equal(parameter._local_tensor, value)  # type: ignore[attr-defined]
    for step in range(2):
        for optimizer in optimizers:
            optimizer.zero_grad()
        dense(whole_batch(step).float()).square().mean().backward()
        scaler.scale(wrapped(own_batch(step).float()).square().mean()).backward()
        optimizers[0].step()
        scaler.step(optimizers[1])
        scaler.update()
    # fp32, of which sums in another order cost the last digit or two.
    compare_weights(dense, wrapped, {"rtol": 1e-5, "atol": 1e-6})


@all_world_sizes
@pytest.mark.parametrize("where", ["input", "gradient"])
def test_an_inf_on_one_rank_makes_gradscaler_skip_on_all(world_size: int, where: str) -> None:
    run_ranks(world_size, _scaler, where)


@multi_world_sizes
def test_lbfgs_gives_the_dense_weights(world_size: int) -> None:
    run_ranks(world_size, _lbfgs)


def _channels_last() -> None:
    """Fused optimizers go through the memory of weights and gradients as if it were alike."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(8, 16, 3, padding=1), nn.Tanh(), nn.Conv2d(16, 8, 3, padding=1)]
    dense = nn.Sequential(*layers).to(device(), torch.float64)
    ranks, rank = dist.get_world_size(), dist.get_rank()
    inputs = torch.randn(2 * ranks, 8, 6, 5, dtype=torch.float64).to(device())
    strategies = ({}, {"*.weight": Gather()}, {"*.weight": Gather(1)}, {"*": Replicate()})
    policies = [ShardingPolicy(rules=rules, replicate_below=0) for rules in strategies]
    for policy in policies:
        theirs, ours = deepcopy(dense), RotatedTensorParallel(deepcopy(dense), policy=policy)
        ours.to(memory_format=torch.channels_last)
        optimizers = [torch.optim.AdamW(m.parameters(), lr=0.1, fused=True) for m in (theirs, ours)]
        for _ in range(3):
            theirs(inputs).square().mean().backward()
            ours(inputs.chunk(ranks)[rank]).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        compare_weights(theirs, ours, {"rtol": 1e-7, "atol": 1e-9}, str(policy.rules))


@multi_world_sizes
def test_a_memory_format_changes_no_step(world_size: int) -> None:
    run_ranks(world_size, _channels_last)


def _compiled() -> None:
    """The hooks around a step run, though a compiler traces it."""
    dense, wrapped = _pair()
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.1) for model in (dense, wrapped)]
    steps: list[Any] = [torch.compile(each.step, backend="eager") for each in optimizers]
    for step in range(2):
        dense(whole_batch(step)).square().mean().backward()
        wrapped(own_batch(step)).square().mean().backward()
        for optimizer, take in zip(optimizers, steps, strict=True):
            take()
            optimizer.zero_grad()
        compare_weights(dense, wrapped)
    loss = wrapped(own_batch(0)).square().mean()
    wrapped(own_batch(1)).square().mean().backward()
    steps[1]()
    with pytest.raises(RuntimeError, match="was written"):
        loss.backward()
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore::UserWarning")  # Dynamo's, of what it leaves out of its graph
@multi_world_sizes
def test_a_compiled_step_is_a_step(world_size: int) -> None:
    run_ranks(world_size, _compiled)
