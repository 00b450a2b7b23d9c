"""MixedPrecisionPolicy: which dtype is used where, and how far the results are from fp32's."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest

if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))

import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy as FSDP2Policy
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from rtp_wrap import (
    Gather,
    MixedPrecisionPolicy,
    Replicate,
    Rotate,
    RotatedTensorParallel,
    ShardingPolicy,
)
from tests.parity import full, fulls, mean_square
from tests.ranks import (
    DEVICE_TYPE,
    WORLD_SIZES,
    all_world_sizes,
    device,
    multi_world_sizes,
    run_ranks,
)

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
#: One of every strategy: 0 is gathered (a convolution rotates otherwise), 2 rotated, the norm
#: replicated.
POLICY = ShardingPolicy(rules={"0": Gather(), "2": Rotate(), "1": Replicate()}, replicate_below=32)


class Keeps(nn.Module):
    """Has a buffer, and remembers what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(1.0 + 2**-20))  # not a number of bf16
        self.seen: list[torch.dtype] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(x.dtype)
        return x * self.scale.to(x.dtype)


def _net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv1d(6, 8, 1), nn.LayerNorm(5), nn.Linear(5, 12), Keeps(), nn.GELU(), nn.Linear(12, 3)
    )


def _x(step: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
    return torch.randn(4, 6, 5, generator=generator).to(device())


def _check_dtypes() -> None:
    torch.manual_seed(0)
    policy = MixedPrecisionPolicy(param_dtype=BF16, output_dtype=FP64)
    model = RotatedTensorParallel(_net().to(device()), policy=POLICY, mixed_precision=policy)
    weights, inputs = [], []
    for layer in model.module:
        layer.register_forward_pre_hook(
            lambda layer, args: weights.append(getattr(layer, "weight", args[0]).dtype)
        )
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(2):
        output = model(_x(step))
        assert output.dtype == FP64  # the model's; inner modules' stay as they are:
        assert model[3].seen.pop() == BF16
        mean_square(output).backward()
        for parameter in model.parameters():
            assert parameter.dtype == FP32
            assert parameter.grad is not None
            assert parameter.grad.dtype == FP32
        optimizer.step()
        optimizer.zero_grad()
    assert set(weights) == {BF16}
    for state in optimizer.state.values():
        assert state["exp_avg"].dtype == FP32
    assert model[3].scale.dtype == FP32
    assert model[3].scale == 1.0 + 2**-20
    with torch.no_grad():
        inputs.append(model.eval()(_x()).dtype)
    assert inputs == [FP64]
    assert model[0].forward(input=_x()).dtype == BF16
    assert model[2](_x()[:, 0]).dtype == BF16  # an inner module as the entry


@all_world_sizes
def test_every_dtype_is_what_the_policy_says(world_size: int) -> None:
    run_ranks(world_size, _check_dtypes)


def _check_wide(reduce: torch.dtype | None, options: dict[str, Any]) -> None:
    """fp64 computation on fp32 parameters is that of the dense fp64 model, up to fp32's rounding.

    Of the gradients alone: 2**-24 relative to the largest part that is rounded, a few times over.
    """
    torch.manual_seed(0)
    narrow = _net().to(device())
    dense = deepcopy(narrow).double()
    policy = MixedPrecisionPolicy(param_dtype=FP64, reduce_dtype=reduce)
    model = RotatedTensorParallel(narrow, mixed_precision=policy, **options)
    size, rank = dist.get_world_size(), dist.get_rank()
    parts = [torch.randn(4, 6, 5, dtype=FP64, device=device()) for _ in range(size)]
    for _ in range(2):  # accumulation
        expected, output = dense(torch.cat(parts)), model(parts[rank])
        torch.testing.assert_close(output, expected[4 * rank :][:4], rtol=1e-12, atol=1e-12)
        mean_square(expected).backward()
        mean_square(output).backward()
    for (fqn, ours), theirs in zip(model.named_parameters(), dense.parameters(), strict=True):
        assert ours.grad is not None
        torch.testing.assert_close(
            full(ours.grad).double(), theirs.grad, rtol=1e-6, atol=1e-7, msg=fqn
        )


WRAPPINGS: dict[str, dict[str, Any]] = {
    "one of each": {"policy": POLICY},
    "tiny staging": {"policy": ShardingPolicy(replicate_below=0, staging_bytes=1024)},
    "in place, input features": {"policy": {"*": Rotate(1)}, "inplace": True},
    "replicated": {"policy": {"*": Replicate()}},
}


@all_world_sizes
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_computation_is_in_param_dtype_and_sums_in_reduce_dtype(
    world_size: int, wrapping: str
) -> None:
    for reduce in (FP64, FP32, None):
        run_ranks(world_size, _check_wide, reduce, WRAPPINGS[wrapping])


def _are_bf16(model: nn.Module) -> dict[str, bool]:
    """Which gradients have values of bf16 only."""
    return {
        fqn: torch.equal(full(p.grad).bfloat16().float(), full(p.grad))
        for fqn, p in model.named_parameters()
        if p.grad is not None
    }


def _check_reduction() -> None:
    for reduce in (BF16, None):
        torch.manual_seed(0)
        policy = MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=reduce)
        model = RotatedTensorParallel(_net().to(device()), policy=POLICY, mixed_precision=policy)
        mean_square(model(_x())).backward()
        weights = {fqn: narrow for fqn, narrow in _are_bf16(model).items() if "weight" in fqn}
        # Sums of several ranks' bf16 gradients have more bits than bf16, unless summed in it.
        assert weights == dict.fromkeys(weights, reduce is BF16)


@multi_world_sizes
def test_the_default_reduction_is_in_the_parameters_dtype(world_size: int) -> None:
    run_ranks(world_size, _check_reduction)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def _distance(model: nn.Module, exact: nn.Module) -> float:
    """How far all gradients together are from the exact ones, relative to their size."""
    theirs = [p.grad for p in exact.parameters() if p.grad is not None]
    ours = fulls(p.grad for p in model.parameters() if p.grad is not None)
    error = sum(float((a.double() - b).square().sum()) for a, b in zip(ours, theirs, strict=True))
    return (error / sum(float(b.square().sum()) for b in theirs)) ** 0.5


def _check_against_fsdp2(reduce: torch.dtype) -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(8, 32), *[Block() for _ in range(3)], nn.Linear(32, 8))
    dense.to(device())
    policy = FSDP2Policy(param_dtype=BF16, reduce_dtype=reduce, output_dtype=FP32)
    ours = RotatedTensorParallel(
        deepcopy(dense), policy=ShardingPolicy(replicate_below=0), mixed_precision=policy
    )
    theirs = deepcopy(dense)
    mesh = init_device_mesh(DEVICE_TYPE, (dist.get_world_size(),))
    for block in theirs[1:-1]:
        fully_shard(block, mesh=mesh, mp_policy=FSDP2Policy(param_dtype=BF16, reduce_dtype=reduce))
    fully_shard(theirs, mesh=mesh, mp_policy=policy)
    exact = dense.double()
    parts = [torch.randn(64, 8, device=device()) for _ in range(dist.get_world_size())]
    mean_square(exact(torch.cat(parts).double())).backward()
    for model in (ours, theirs):
        output = model(parts[dist.get_rank()])
        assert output.dtype == FP32
        mean_square(output).backward()
    distances = _distance(ours, exact), _distance(theirs, exact)
    # Both are some 1 % away: bf16 keeps 8 bits, through seven layers. Summing dx over tiles rounds
    # it N times instead of once, and the accumulator of bf16 sums chains its additions.
    assert distances[0] <= 1.3 * distances[1], distances
    assert distances[1] < 0.03


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view:UserWarning")
@multi_world_sizes
@pytest.mark.parametrize("reduce", [FP32, BF16], ids=["fp32 sums", "bf16 sums"])
def test_errors_are_those_of_fsdp2(world_size: int, reduce: torch.dtype) -> None:
    run_ranks(world_size, _check_against_fsdp2, reduce)


def _check_inputs() -> None:
    net = nn.Sequential(nn.Identity(), nn.Linear(5, 6)).to(device())
    policy = MixedPrecisionPolicy(param_dtype=BF16, cast_forward_inputs=False)
    model = RotatedTensorParallel(
        net, policy=ShardingPolicy(replicate_below=0), mixed_precision=policy
    )
    assert model(_x().bfloat16()).dtype == BF16
    if dist.get_world_size() > 1:
        with pytest.raises(TypeError, match=r"^1: input is torch.float32 but the layer computes"):
            model(_x())
        assert model(_x().bfloat16()).dtype == BF16  # and nothing was sent


@all_world_sizes
def test_inputs_are_cast_only_if_the_policy_says_so(world_size: int) -> None:
    run_ranks(world_size, _check_inputs)


def _check_range(home: torch.dtype, reduce: torch.dtype | None) -> None:
    """Gradients whose mean fp16 can hold, and their sum cannot."""
    policy = MixedPrecisionPolicy(reduce_dtype=reduce)
    for strategy in (Rotate(), Gather(), Replicate()):
        linear = nn.Linear(2, 2, bias=False, device=device(), dtype=home)
        model = RotatedTensorParallel(linear, policy={"*": strategy}, mixed_precision=policy)
        (200 * model(torch.full((1, 2), 200.0, device=device(), dtype=home))).sum().backward()
        grad = model.weight.grad
        assert torch.equal(full(grad).float(), torch.full((2, 2), 40000.0, device=device()))


@multi_world_sizes
def test_sums_in_16_bits_overflow_no_sooner_than_the_mean(world_size: int) -> None:
    run_ranks(world_size, _check_range, FP16, None)
    run_ranks(world_size, _check_range, FP32, FP16)


def _check_norms() -> None:
    """As torch computes with bf16 convolutions around a batch norm that is left in fp32."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(6, 8, 1), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 2, 1))
    net.to(device())
    policy = MixedPrecisionPolicy(param_dtype=BF16)
    for strategy in (Replicate(), Gather()):
        plain = deepcopy(net)
        for layer in (plain[0], plain[3]):
            layer.bfloat16()
        model = RotatedTensorParallel(deepcopy(net), policy={"*": strategy}, mixed_precision=policy)
        for _ in range(2):
            x = torch.randn(4, 6, 5, device=device())  # the same on all ranks
            plain.zero_grad()
            model.zero_grad()
            mean_square(plain(x.bfloat16()).float()).backward()
            mean_square(model(x).float()).backward()
            assert model[1].running_mean.dtype == FP32
            torch.testing.assert_close(model[1].running_mean, plain[1].running_mean)
            # One rounding of bf16, where cuDNN may take another algorithm the second time.
            assert _distance(model, plain) < 2**-8


@all_world_sizes
def test_norms_with_statistics_keep_their_dtype(world_size: int) -> None:
    run_ranks(world_size, _check_norms)


def _check_outputs_alone() -> None:
    torch.manual_seed(0)
    dense = _net().to(device())
    policy = MixedPrecisionPolicy(output_dtype=FP64)
    model = RotatedTensorParallel(deepcopy(dense), policy=POLICY, mixed_precision=policy)
    x = _x()
    assert model(x).dtype == FP64
    torch.testing.assert_close(model(x), dense(x).to(FP64))


@all_world_sizes
def test_outputs_alone_can_be_cast(world_size: int) -> None:
    run_ranks(world_size, _check_outputs_alone)


def _check_checkpointing() -> None:
    for reentrant in (False, True):
        torch.manual_seed(0)
        dense = _net().to(device())
        policy = MixedPrecisionPolicy(param_dtype=BF16, output_dtype=FP32)
        models = [
            RotatedTensorParallel(deepcopy(dense), policy=POLICY, mixed_precision=policy)
            for _ in range(2)
        ]
        x = _x().requires_grad_()
        mean_square(models[0](x)).backward()

        net = models[1].module
        middle = checkpoint(net[:3], x, use_reentrant=reentrant)
        mean_square(checkpoint(net[3:], middle, use_reentrant=reentrant).float()).backward()
        for ours, theirs in zip(models[1].parameters(), models[0].parameters(), strict=True):
            assert ours.grad is not None
            assert theirs.grad is not None
            assert torch.equal(full(ours.grad), full(theirs.grad))


@multi_world_sizes
def test_checkpointed_blocks_compute_again_in_the_same_dtypes(world_size: int) -> None:
    run_ranks(world_size, _check_checkpointing)


def _different_policies() -> str:
    policy = MixedPrecisionPolicy(param_dtype=BF16 if dist.get_rank() else FP16)
    with pytest.raises(RuntimeError, match="Wrap the same model with the same policy") as caught:
        RotatedTensorParallel(_net().to(device()), mixed_precision=policy)
    return str(caught.value)


@multi_world_sizes
def test_ranks_with_different_policies_are_told(world_size: int) -> None:
    for message in run_ranks(world_size, _different_policies):
        assert "float16" in message
        assert "bfloat16" in message


def test_a_policy_is_checked_when_it_is_made() -> None:
    with pytest.raises(TypeError, match=r"param_dtype='bf16' is no torch.dtype"):
        MixedPrecisionPolicy(param_dtype="bf16")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"reduce_dtype=torch.int8: give a floating-point dtype"):
        MixedPrecisionPolicy(reduce_dtype=torch.int8)
    with pytest.raises(TypeError, match=r"mixed_precision=torch.bfloat16: give a Mixed"):
        MixedPrecisionPolicy.of(BF16)  # type: ignore[arg-type]
    policy = MixedPrecisionPolicy.of(FSDP2Policy(BF16, FP32, FP16, False))
    assert policy == MixedPrecisionPolicy(
        param_dtype=BF16, reduce_dtype=FP32, output_dtype=FP16, cast_forward_inputs=False
    )
    assert policy.compute_dtype(torch.int64) == policy.accumulator_dtype(torch.int64) == torch.int64


DTYPES = [None, BF16, FP16, FP32, FP64]
#: Relative precision of one rounding.
EPSILON = {dtype: torch.finfo(dtype or FP32).eps for dtype in DTYPES}


def _check_any(
    home: torch.dtype,
    param: torch.dtype | None,
    reduce: torch.dtype | None,
    sizes: tuple[int, int],
    options: dict[str, Any],
) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(sizes[0], sizes[1]), nn.Tanh(), nn.Linear(sizes[1], sizes[0]))
    net.to(device(), home)
    dense = deepcopy(net).double()
    policy = MixedPrecisionPolicy(param_dtype=param, reduce_dtype=reduce)
    model = RotatedTensorParallel(net, mixed_precision=policy, **options)
    x = torch.randn(6, sizes[0], device=device(), dtype=param or home)
    output = model(x)
    assert output.dtype == (param or home)
    expected = dense(x.double())
    narrowest = max(EPSILON[dtype] for dtype in (home, param or home, reduce or home))
    # A dozen roundings of numbers of order 1 in the narrowest dtype, with room for bad luck.
    bound = {"rtol": 0.0, "atol": 40 * narrowest}
    torch.testing.assert_close(output.double(), expected, **bound)
    output.double().square().sum().backward()  # the same data on all ranks: its mean is one rank's
    expected.square().sum().backward()
    for ours, theirs in zip(model.parameters(), dense.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert ours.grad.dtype == home
        scale = max(1.0, float(theirs.grad.abs().max()))
        error = float((full(ours.grad).double() - theirs.grad).abs().max())
        assert error <= 40 * narrowest * scale


@given(
    st.sampled_from(WORLD_SIZES),
    st.sampled_from([BF16, FP16, FP32, FP64]),
    st.sampled_from(DTYPES),
    st.sampled_from(DTYPES),
    st.tuples(st.integers(1, 24), st.integers(1, 24)),
    st.sampled_from(list(WRAPPINGS)[1:]),
)
def test_any_combination_of_dtypes(
    world_size: int,
    home: torch.dtype,
    param: torch.dtype | None,
    reduce: torch.dtype | None,
    sizes: tuple[int, int],
    wrapping: str,
) -> None:
    run_ranks(world_size, _check_any, home, param, reduce, sizes, WRAPPINGS[wrapping])
