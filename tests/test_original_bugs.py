"""What the original RTP gets wrong, one test for each promise that it breaks.

Every check is of gradients and weights against the dense model, so a scheme that leaves weights
rotated, overwrites or sums gradients, or keeps some of them local fails here.
"""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from itertools import pairwise
from typing import Any

import pytest

if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))

import torch
import torch.distributed as dist
import torch.utils.checkpoint
from torch import nn
from torch.utils._pytree import tree_leaves

from rtp_wrap import Gather, Replicate, Rotate, RotatedTensorParallel, ShardingPolicy
from rtp_wrap.transport import Staging
from tests.data import batch, own_batch, whole_batch
from tests.parity import FP64, check_parity, compare_gradients, compare_weights, full, sgd
from tests.ranks import all_world_sizes, device, multi_world_sizes, replace_ranks, run_ranks

ROTATE = ShardingPolicy(replicate_below=0)


def _mlp(width: int = 8, out: int = 8) -> nn.Module:
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, out))


def _pair(model: nn.Module | None = None, **wrap: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    dense = (model or _mlp()).to(device(), torch.float64)
    wrap.setdefault("policy", ROTATE)
    return dense, RotatedTensorParallel(deepcopy(dense), **wrap)


def _loss(y: torch.Tensor) -> torch.Tensor:
    return (y - 0.5).square().mean()


def _row_1() -> None:
    dense, wrapped = _pair()
    optimizers = [sgd(dense.parameters()), sgd(wrapped.parameters())]
    alive: list[torch.Tensor] = []
    for step in range(4):
        for model, x, optimizer in zip(
            (dense, wrapped), (whole_batch(step), own_batch(step)), optimizers, strict=True
        ):
            y = model(x)
            loss = _loss(y)
            alive += [y, loss]
            optimizer.zero_grad()
            loss.backward()
        compare_gradients(dense, wrapped, FP64, f"step {step}")
        for optimizer in optimizers:
            optimizer.step()
        compare_weights(dense, wrapped, FP64, f"step {step}")


@all_world_sizes
def test_1_gradients_stay_right_while_earlier_outputs_and_losses_are_alive(world_size: int) -> None:
    run_ranks(world_size, _row_1)


def _row_2() -> None:
    dense, wrapped = _pair()
    expected = dense(whole_batch(0)).chunk(dist.get_world_size())[dist.get_rank()]
    for _ in range(2 * dist.get_world_size() + 1):
        wrapped(own_batch(0))  # with a graph that nobody runs backward
        with torch.no_grad():
            torch.testing.assert_close(wrapped(own_batch(0)), expected, **FP64)
        torch.testing.assert_close(wrapped.eval()(own_batch(0)), expected, **FP64)
    wrapped.train()
    _loss(dense(whole_batch(0))).backward()
    _loss(wrapped(own_batch(0))).backward()
    compare_gradients(dense, wrapped)


@all_world_sizes
def test_2_forwards_without_backward_leave_weights_where_they_were(world_size: int) -> None:
    run_ranks(world_size, _row_2)


class Twice(nn.Module):
    """A module used twice, and a weight that two modules share."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(6, 6)
        self.other = nn.Linear(6, 6, bias=False)
        self.other.weight = self.shared.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.other(torch.tanh(self.shared(torch.tanh(self.shared(x)))))


def _row_3() -> None:
    dense, wrapped = _pair(Twice())
    for model, x in ((dense, whole_batch), (wrapped, own_batch)):
        first, second = model(x(0)), model(x(1))
        _loss(first).backward()
        _loss(second).backward()
    compare_gradients(dense, wrapped)


@all_world_sizes
def test_3_two_forwards_reused_modules_and_tied_weights_are_right(world_size: int) -> None:
    run_ranks(world_size, _row_3)


def _row_4() -> None:
    dense, wrapped = _pair()
    for model, x in ((dense, whole_batch), (wrapped, own_batch)):
        for step in range(3):
            _loss(model(x(step))).backward()
    compare_gradients(dense, wrapped)


@all_world_sizes
def test_4_gradients_accumulate(world_size: int) -> None:
    run_ranks(world_size, _row_4)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def block(x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(self.second(torch.tanh(self.first(x))))

        y: torch.Tensor = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
        return self.third(y)


def _row_5() -> None:
    for frozen in ("first", "second", "third"):

        def freeze(model: nn.Module, frozen: str = frozen) -> None:
            model.get_submodule(frozen).requires_grad_(False)

        check_parity(Checkpointed, batch, steps=2, prepare=freeze, policy=ROTATE)


@all_world_sizes
def test_5_frozen_layers_and_non_reentrant_checkpointing_work(world_size: int) -> None:
    run_ranks(world_size, _row_5)


def _row_7() -> None:
    for dim in (0, 1):
        policy = ShardingPolicy(rules={"*weight": Rotate(dim)}, replicate_below=0)
        wrapped = check_parity(_mlp, batch, policy=policy, inplace=True)
        assert wrapped[0].weight.placements[0].dim == dim
    # Send and receive are never in one buffer: the slots of a rotation do not overlap.
    for count in (2, 3, 4):
        slots = Staging(4096, device()).slots(count)
        starts = sorted(slot.data_ptr() for slot in slots)
        assert all(b - a >= slots[0].nbytes for a, b in pairwise(starts))


@all_world_sizes
def test_7_row_split_biases_and_the_inplace_mode_are_right_at_every_world_size(
    world_size: int,
) -> None:
    run_ranks(world_size, _row_7)


class Bare(nn.Module):
    """A norm, a bare parameter and a scalar: nothing that a rotation would take."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 7)
        self.norm = nn.LayerNorm(7)
        self.bare = nn.Parameter(torch.randn(7))
        self.gate = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.linear(x)) * self.bare * self.gate


def _row_8() -> None:
    for policy in (None, ROTATE, {"linear": Replicate()}, {"bare": Gather()}):
        wrapped = check_parity(Bare, batch, policy=policy)
        for fqn, parameter in wrapped.named_parameters():
            mine = full(parameter.detach()).contiguous()
            first = mine.clone()
            dist.broadcast(first, 0)
            assert torch.equal(mine, first), f"{fqn} drifted apart"


@all_world_sizes
def test_8_parameters_that_are_not_sharded_are_averaged_and_never_drift_apart(
    world_size: int,
) -> None:
    run_ranks(world_size, _row_8)


def _row_9() -> None:
    dense, wrapped = _pair()
    x = whole_batch(0)  # the same data everywhere: the average is each rank's own gradient
    _loss(dense(x)).backward()
    _loss(wrapped(x)).backward()
    compare_gradients(dense, wrapped)


@all_world_sizes
def test_9_gradients_are_averaged_not_summed(world_size: int) -> None:
    run_ranks(world_size, _row_9)


def _row_10() -> None:
    """Two halves of the ranks with models of their own; neither sees the other's weights."""
    ranks, world_size = dist.get_rank(), dist.get_world_size()
    groups = [dist.new_group([r for r in range(world_size) if r % 2 == half]) for half in (0, 1)]
    group = groups[ranks % 2]
    assert isinstance(group, dist.ProcessGroup)
    torch.manual_seed(ranks % 2)
    dense = _mlp().to(device(), torch.float64)
    wrapped = RotatedTensorParallel(deepcopy(dense), group, policy=ROTATE)
    x = torch.randn(4 * group.size(), 6, dtype=torch.float64, device=device())
    _loss(dense(x)).backward()
    _loss(wrapped(x.chunk(group.size())[group.rank()])).backward()
    compare_gradients(dense, wrapped)
    dist.destroy_process_group(group)


@multi_world_sizes
def test_10_rotations_stay_in_their_group(world_size: int) -> None:
    run_ranks(world_size, _row_10)
    if world_size % 2:  # one half has another number of ranks, and may be one rank alone
        replace_ranks(world_size)


def _row_11() -> None:
    for width, out in ((7, 5), (1, 3), (11, 1), (2, 13)):
        for dim in (0, 1):
            policy = ShardingPolicy(rules={"*weight": Rotate(dim)}, replicate_below=0)
            check_parity(partial(_mlp, width, out), batch, steps=2, policy=policy)


@all_world_sizes
def test_11_sizes_need_not_divide_by_the_world_size(world_size: int) -> None:
    run_ranks(world_size, _row_11)


def _row_12() -> None:
    dense, wrapped = _pair()
    state = wrapped.state_dict()
    assert [value.shape for value in state.values()] == [
        v.shape for v in dense.state_dict().values()
    ]
    whole = {fqn: full(value) for fqn, value in state.items()}
    assert not _mlp().to(device(), torch.float64).load_state_dict(whole).missing_keys
    for convert in ("half", "float", "double"):
        getattr(wrapped, convert)()
        getattr(dense, convert)()
        compare_weights(dense, wrapped, {"rtol": 0.0, "atol": 0.0})
    wrapped.to(device())
    optimizers = [sgd(dense.parameters()), sgd(wrapped.parameters())]
    _loss(dense(whole_batch(0))).backward()
    _loss(wrapped(own_batch(0))).backward()
    for optimizer in optimizers:
        optimizer.step()
    compare_weights(dense, wrapped)


@all_world_sizes
def test_12_state_dict_leads_back_to_the_dense_model_and_conversions_work(world_size: int) -> None:
    run_ranks(world_size, _row_12)


def _row_13() -> None:
    world_size = dist.get_world_size()
    model = nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(8)])
    modules = list(model.modules())
    whole = sum(parameter.nbytes for parameter in model.parameters())
    wrapped = RotatedTensorParallel(model, policy=ROTATE)
    parameters: list[Any] = list(wrapped.parameters())
    kept = sum(parameter._local_tensor.untyped_storage().nbytes() for parameter in parameters)
    assert kept * world_size <= whole * 1.1, f"{kept} of {whole} bytes on one of {world_size} ranks"
    assert list(wrapped.module.modules()) == modules, "there are more modules than before"


@all_world_sizes
def test_13_a_rank_keeps_one_nth_and_no_copies_of_modules(world_size: int) -> None:
    run_ranks(world_size, _row_13)


class _Allocations(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.functions: set[str] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        self.functions.add(function.name())
        if type(result) is torch.Tensor and result.numel():
            given = [each for each in tree_leaves((args, kwargs)) if type(each) is torch.Tensor]
            address = result.untyped_storage().data_ptr()
            if all(each.untyped_storage().data_ptr() != address for each in given):
                self.sizes.append(result.numel())
        return result


def _row_14() -> None:
    _, wrapped = _pair(nn.Linear(6, 64, bias=False))
    for _ in range(2):
        x = own_batch(0)
        with _Allocations() as forward:
            y = wrapped(x)
        # The output and nothing else: no staging per call, no pieces that are concatenated.
        assert forward.sizes == [y.numel()] or dist.get_world_size() == 1
        assert not any("cat" in name for name in forward.functions), forward.functions
        _loss(y).backward()


@all_world_sizes
def test_14_a_forward_allocates_its_output_alone_and_concatenates_nothing(world_size: int) -> None:
    run_ranks(world_size, _row_14)
