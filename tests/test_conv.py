"""Convolutions on rotating weights, against the dense layers on the whole batch in one process.

Also runs as ranks of a job: `torchrun --nproc_per_node=2 -m pytest tests/test_conv.py`, or
`python -m torch.distributed.launch --nproc_per_node=2 tests/test_conv.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import pytest

if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))

import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from rtp_wrap import (
    Gather,
    MixedPrecisionPolicy,
    Replicate,
    Rotate,
    RotatedTensorParallel,
    ShardingPolicy,
)
from rtp_wrap.modules.conv import RotatedConv, RotatedConvTranspose
from rtp_wrap.shard import TileGrid
from tests.parity import FP64, check_parity, full, fulls, mean_square, sgd
from tests.ranks import (
    DEVICE_TYPE,
    WORLD_SIZES,
    all_world_sizes,
    device,
    multi_world_sizes,
    run_ranks,
)
from tests.rotated import TINY, by_ring, dims, no_communication

#: One that divides most sizes and one that does not; the property test has all.
few_world_sizes = pytest.mark.parametrize("world_size", [2, 3])


CONVS = {False: (nn.Conv1d, nn.Conv2d, nn.Conv3d)}
CONVS[True] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
ALL = CONVS[False] + CONVS[True]


def _policy(
    dim: int | None = None, staging_bytes: int | None = None, bias: Any = None
) -> ShardingPolicy:
    """Small layers too; the bias is replicated (being small) unless a rule is given for it."""
    rules: dict[Any, Any] = {} if bias is None else {"*bias": bias}
    rules |= {lambda fqn, module: type(module).__name__.startswith("Conv"): Rotate(dim)}
    return ShardingPolicy(rules=rules, staging_bytes=staging_bytes)


@contextmanager
def _ieee() -> Iterator[None]:
    """Without cuDNN's defaults: fp32 inputs rounded to TF32, kernels that sum in any order."""
    cudnn = torch.backends.cudnn
    before = cudnn.conv.fp32_precision, cudnn.deterministic
    cudnn.conv.fp32_precision, cudnn.deterministic = "ieee", True
    try:
        yield
    finally:
        cudnn.conv.fp32_precision, cudnn.deterministic = before


def _random(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@dataclass
class Case:
    """A layer and the spatial sizes of its input."""

    type: type[nn.Module]
    inputs: int
    outputs: int
    kernel: Any
    sizes: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    output_size: list[int] | None = None

    def layer(self) -> nn.Module:
        return self.type(self.inputs, self.outputs, self.kernel, **self.options)

    def __str__(self) -> str:
        given = {"output_size": self.output_size} if self.output_size else {}
        options = ", ".join(f"{key}={value}" for key, value in {**self.options, **given}.items())
        return f"{self.type.__name__} {self.inputs}->{self.outputs} {self.kernel} {options}"


class Stack(nn.Module):
    """A layer behind another one, so that the gradient of its input matters."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        pointwise = CONVS[False][len(case.sizes) - 1]
        self.before = pointwise(case.inputs, case.inputs, 1)
        self.layer = case.layer()
        self.more = [case.output_size] if case.output_size else []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with warnings.catch_warnings():
            # Of the dense layer: that it may copy its input, as ours does too.
            warnings.filterwarnings("ignore", "Using padding='same' with even kernel lengths")
            return self.layer(self.before(x).tanh(), *self.more)


def _train(
    case: Case,
    *,
    dim: int | None = None,
    inplace: bool = False,
    staging_bytes: int | None = None,
    samples: int = 2,
    steps: int = 2,
    **options: Any,
) -> None:
    with _ieee():
        wrapped = check_parity(
            lambda: Stack(case),
            lambda step, rank: (_random(samples, case.inputs, *case.sizes, seed=10 * step + rank),),
            steps=steps,
            policy=_policy(dim, staging_bytes),
            inplace=inplace,
            **options,
        )
    form = RotatedConvTranspose if case.type in CONVS[True] else RotatedConv
    assert isinstance(wrapped.layer, form)
    natural = 1 if case.type in CONVS[True] else 0
    assert wrapped.layer._adoption.strategies["weight"] == Rotate(natural if dim is None else dim)


CASES = [
    Case(nn.Conv1d, 4, 6, 3, (5,)),
    Case(nn.Conv1d, 3, 5, 3, (6,), {"stride": 2, "padding": 1, "bias": False}),
    Case(nn.Conv1d, 3, 5, 4, (5,), {"padding": "same"}),  # one more on the far side
    Case(nn.Conv2d, 3, 4, (3, 2), (4, 3), {"padding": "same", "dilation": (2, 3)}),
    Case(nn.Conv2d, 3, 4, 2, (3, 4), {"padding": "valid"}),
    Case(
        nn.Conv2d, 4, 5, (3, 2), (7, 5),
        {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)},
    ),
    Case(nn.Conv2d, 3, 4, 3, (4, 3), {"padding": (1, 2), "padding_mode": "reflect"}),
    Case(nn.Conv2d, 3, 4, 3, (4, 3), {"padding": (0, 2), "padding_mode": "replicate"}),
    Case(nn.Conv2d, 3, 4, 3, (4, 3), {"padding": (1, 2), "padding_mode": "circular"}),
    Case(nn.Conv2d, 3, 4, (4, 3), (4, 3), {"padding": "same", "padding_mode": "circular"}),
    Case(nn.Conv3d, 2, 5, (2, 1, 3), (3, 2, 4), {"padding": (1, 0, 1), "stride": (1, 2, 1)}),
    # 2 and 3 ranks own parts of groups, whole groups, and both.
    Case(nn.Conv1d, 6, 9, 2, (4,), {"groups": 3}),
    Case(nn.Conv2d, 8, 10, 2, (3, 3), {"groups": 2, "bias": False}),
    Case(nn.Conv2d, 5, 5, 3, (4, 3), {"groups": 5, "padding": 1}),
    Case(nn.Conv1d, 5, 15, 2, (4,), {"groups": 5}),
    Case(nn.Conv1d, 20, 5, 2, (3,), {"groups": 5}),
    Case(nn.ConvTranspose1d, 4, 6, 3, (4,)),
    Case(nn.ConvTranspose1d, 5, 3, 3, (4,), {"stride": 2, "padding": 1, "bias": False}),
    Case(
        nn.ConvTranspose2d, 4, 5, (3, 2), (3, 2),
        {"stride": (3, 2), "padding": (1, 0), "output_padding": (2, 1), "dilation": (2, 1)},
    ),
    Case(nn.ConvTranspose2d, 3, 4, 3, (2, 3), {"stride": (3, 2), "padding": 1}, [6, 5]),
    Case(nn.ConvTranspose3d, 2, 5, (2, 1, 3), (2, 2, 3), {"padding": (1, 0, 1)}, None),
    Case(nn.ConvTranspose1d, 9, 6, 2, (4,), {"groups": 3}),
    Case(nn.ConvTranspose2d, 10, 8, 2, (2, 3), {"groups": 2, "bias": False}),
    Case(nn.ConvTranspose2d, 5, 5, 3, (3, 2), {"groups": 5, "padding": 1}),
    Case(nn.ConvTranspose1d, 5, 20, 2, (3,), {"groups": 5}),
]  # fmt: skip


def _train_all_ways(case: Case) -> None:
    _train(case, staging_bytes=TINY)
    _train(case, dim=0 if case.type in CONVS[True] else 1, inplace=True)


@few_world_sizes
@pytest.mark.parametrize("case", CASES, ids=str)
def test_training_is_that_of_the_dense_layer(world_size: int, case: Case) -> None:
    run_ranks(world_size, _train_all_ways, case)


def _is_cut_in_both_directions(case: Case, world_size: int, dim: int) -> bool:
    shape = tuple(case.layer().weight.shape)
    grid = TileGrid(shape, dim, world_size, TINY // 4 // torch.float64.itemsize)
    rows, cols = grid.shard(0).shape
    return grid.cell[0] < rows and grid.cell[1] < cols


@multi_world_sizes
@dims
def test_a_kernel_row_larger_than_a_slot_is_cut(world_size: int, dim: int) -> None:
    for case in (
        Case(nn.Conv2d, 10, 6, 5, (5, 6), {"groups": 2}),
        Case(nn.ConvTranspose2d, 6, 10, 5, (2, 1), {"groups": 2}),
    ):
        assert _is_cut_in_both_directions(case, world_size, dim)
        run_ranks(world_size, _train, case, dim=dim, staging_bytes=TINY)


@multi_world_sizes
@pytest.mark.parametrize("rule", [Gather(), Replicate()])
def test_a_bias_may_be_gathered_or_replicated(world_size: int, rule: Any) -> None:
    run_ranks(world_size, _bias_rule, rule)


def _bias_rule(rule: Any) -> None:
    case = Case(nn.ConvTranspose1d, 3, 6, 3, (4,), {"groups": 3})
    check_parity(
        lambda: Stack(case),
        lambda step, rank: (_random(2, 3, 4, seed=10 * step + rank),),
        policy=_policy(bias=rule),
    )


@st.composite
def _cases(draw: Any) -> Case:
    transposed = draw(st.booleans())
    spatial = draw(st.integers(1, 3))
    groups = draw(st.integers(1, 5))
    each = st.tuples
    kernel = draw(each(*[st.integers(1, 3)] * spatial))
    dilation = draw(each(*[st.integers(1, 2)] * spatial))
    stride = draw(each(*[st.integers(1, 3)] * spatial))
    options: dict[str, Any] = {
        "groups": groups,
        "dilation": dilation,
        "bias": draw(st.booleans()),
        "padding": draw(each(*[st.integers(0, 1 if transposed else 2)] * spatial)),
    }
    if transposed:
        options["stride"] = stride
        options["output_padding"] = tuple(
            draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)
        )
    else:
        options["padding_mode"] = draw(
            st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"])
        )
        if draw(st.booleans()):
            options["padding"] = "same"
        else:
            options["stride"] = stride
    # Large enough for the kernel, and to be reflected by any of the paddings.
    sizes = tuple(
        max(3, d * (k - 1) + 1) + draw(st.integers(0, 1))
        for k, d in zip(kernel, dilation, strict=True)
    )
    inputs, outputs = (groups * draw(st.integers(1, 5)) for _ in range(2))
    return Case(CONVS[transposed][spatial - 1], inputs, outputs, kernel, sizes, options)


#: Sums of at most a few hundred products, of size 1, in fp32: a few hundred of its epsilons, which
#: are 1e-7, in the worst case; in effect a few. Two steps hardly add to it.
FP32 = {"rtol": 1e-4, "atol": 1e-5}


@settings(max_examples=max(1, settings.default.max_examples * 3 // 5))
@given(
    world_size=st.sampled_from(WORLD_SIZES),
    case=_cases(),
    dim=st.sampled_from([None, 0, 1]),
    inplace=st.booleans(),
    staging_bytes=st.integers(TINY, 8 * TINY),
    samples=st.integers(1, 3),
    dtype=st.sampled_from([torch.float64, torch.float64, torch.float32]),
)
def test_training_is_right_whatever_the_options(
    world_size: int, dtype: torch.dtype, **options: Any
) -> None:
    tolerance = FP64 if dtype == torch.float64 else FP32
    run_ranks(world_size, _train, dtype=dtype, tolerance=tolerance, **options)


# Inputs of all kinds, where the oracle is DDP's promise: the mean of the ranks' own gradients.


def _channels_last(*shape: int, seed: int) -> torch.Tensor:
    return _random(*shape, seed=seed).contiguous(memory_format=torch.channels_last)


#: The input of a rank, for a layer with 6 input channels in two dimensions.
INPUTS: dict[str, Callable[[int], torch.Tensor]] = {
    "batched": lambda rank: _random(2, 6, 4, 3, seed=rank),
    "unbatched": lambda rank: _random(6, 4, 3, seed=rank),
    "channels last": lambda rank: _channels_last(2, 6, 4, 3, seed=rank),
    "strided": lambda rank: _random(3, 2, 4, 12, seed=rank).permute(1, 3, 2, 0)[:, ::2],
    "expanded": lambda rank: _random(1, 6, 4, 3, seed=rank).expand(3, 6, 4, 3),
    "of another size on each rank": lambda rank: _random(rank + 1, 6, 4 + rank, 5, seed=rank),
    "empty on rank 0": lambda rank: _random(2 * rank, 6, 4, 3, seed=rank),
    "empty on all ranks": lambda rank: _random(0, 6, 4, 3, seed=rank),
}


def _two(transposed: bool, **options: Any) -> nn.Module:
    return CONVS[transposed][1](6, 8, (3, 2), groups=2, **options)


def _check_mean_of_gradients(
    kind: str,
    transposed: bool,
    dim: int,
    *,
    needs_dx: bool = True,
    frozen: tuple[str, ...] = (),
    padding_mode: str = "zeros",
    loss: Callable[[torch.Tensor], torch.Tensor] = lambda y: y.sin().sum(),
) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    dense = _two(transposed, padding=1, padding_mode=padding_mode).to(device(), torch.float64)
    for name, parameter in dense.named_parameters():
        parameter.requires_grad_(name not in frozen)
    wrapped = RotatedTensorParallel(deepcopy(dense), policy=_policy(dim, TINY))
    everyone = [INPUTS[kind](r).to(device()).requires_grad_(needs_dx) for r in range(world_size)]
    x = everyone[rank].detach().requires_grad_(needs_dx)
    y = wrapped(x)
    for r, theirs in enumerate(everyone):
        expected = dense(theirs)
        if r == rank:
            torch.testing.assert_close(y, expected, **FP64)
        if expected.requires_grad:
            (loss(expected) / world_size).backward()
    if kind == "channels last" and padding_mode == "zeros":  # other padding makes it contiguous
        assert y.is_contiguous(memory_format=torch.channels_last)
    assert y.requires_grad == (needs_dx or len(frozen) < 2)
    if y.requires_grad:
        loss(y).backward()
    assert (x.grad is None) == (not needs_dx)
    if x.grad is not None:  # not averaged: the gradient of this rank's own loss
        torch.testing.assert_close(x.grad, everyone[rank].grad * world_size, **FP64)
    for name, parameter in wrapped.named_parameters():
        expected = dense.get_parameter(name).grad
        if name in frozen:
            assert parameter.grad is None
        else:
            torch.testing.assert_close(full(parameter.grad), expected, **FP64)


def _check_inputs(kind: str) -> None:
    for transposed in (False, True):
        for dim in (0, 1):
            _check_mean_of_gradients(kind, transposed, dim)
    _check_mean_of_gradients(kind, False, 0, padding_mode="circular")


@multi_world_sizes
@pytest.mark.parametrize("kind", INPUTS)
def test_an_input_may_be(world_size: int, kind: str) -> None:
    run_ranks(world_size, _check_inputs, kind)


def _check_frozen() -> None:
    for frozen in ((), ("weight",), ("bias",), ("weight", "bias")):
        for needs_dx in (True, False):
            for transposed in (False, True):
                _check_mean_of_gradients("batched", transposed, 0, needs_dx=needs_dx, frozen=frozen)


@few_world_sizes
def test_only_what_requires_gradients_gets_them(world_size: int) -> None:
    run_ranks(world_size, _check_frozen)


def _of_transposed(y: torch.Tensor) -> torch.Tensor:
    return y.transpose(0, 1).contiguous().sin().sum()


def _check_losses() -> None:
    for loss in (torch.sum, _of_transposed):
        for transposed in (False, True):
            _check_mean_of_gradients("batched", transposed, 0, loss=loss)


@few_world_sizes
def test_the_gradient_of_the_output_may_be_expanded_or_transposed(world_size: int) -> None:
    run_ranks(world_size, _check_losses)


def _train_in_poisoned_memory() -> None:
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        assert torch.empty(1).isnan()
        for transposed in (False, True):
            for dim in (0, 1):
                for kind in ("batched", "channels last", "empty on rank 0"):
                    _check_mean_of_gradients(kind, transposed, dim)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.skipif(DEVICE_TYPE != "cpu", reason="on CUDA the mode needs an environment variable")
@few_world_sizes
def test_memory_is_written_before_it_is_read(world_size: int) -> None:
    run_ranks(world_size, _train_in_poisoned_memory)


def _saved(frozen: bool, transposed: bool) -> int:
    model = _two(transposed).to(device())
    model.weight.requires_grad_(not frozen)
    wrapped = RotatedTensorParallel(model, policy=_policy())
    x = torch.randn(2, 6, 4, 3, device=device(), requires_grad=True)
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        wrapped(x)
    assert all(tensor.data_ptr() == x.data_ptr() for tensor in saved)
    return len(saved)


@multi_world_sizes
def test_nothing_but_the_input_is_kept_for_backward_and_that_only_for_wgrad(
    world_size: int,
) -> None:
    for transposed in (False, True):
        assert run_ranks(world_size, _saved, False, transposed) == [1] * world_size
        assert run_ranks(world_size, _saved, True, transposed) == [0] * world_size


class _Counter(TorchDispatchMode):
    """Counts convolutions, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func.overloadpacket in (
            torch.ops.aten.convolution,
            torch.ops.aten.convolution_backward,
        )
        return func(*args, **(kwargs or {}))


@by_ring  # peers have whole weights for tiles
def _count(transposed: bool, groups: int, dim: int) -> int:
    layer = CONVS[transposed][0](96, 96, 2, groups=groups, device=device())
    wrapped = RotatedTensorParallel(layer, policy=_policy(dim))
    with _Counter() as counter:
        wrapped(torch.zeros(1, 96, 3, device=device()))
    return counter.calls


@multi_world_sizes
def test_all_whole_groups_of_a_tile_are_one_convolution(world_size: int) -> None:
    for transposed in (False, True):
        for groups in (96, 8, 1):
            # A third of 8 groups ends inside a group, the next begins there and ends in another.
            parts = 2 + 3 + 2 if (groups, world_size) == (8, 3) else world_size
            assert run_ranks(world_size, _count, transposed, groups, 0) == [parts] * world_size
    # All columns of a depthwise convolution are one, and that is rank 0's.
    assert run_ranks(world_size, _count, False, 96, 1) == [1] * world_size


def _tensors(model: nn.Module, *others: torch.Tensor) -> list[torch.Tensor]:
    parameters = fulls(p.detach() for p in model.parameters())
    return [*others, *fulls(p.grad for p in model.parameters()), *parameters]


def _exact() -> None:
    for case in CASES:
        if case.options.get("padding_mode") in ("reflect", "replicate"):
            continue  # on CUDA torch itself adds up their gradients in any order
        for bias_rule in (Gather(), Replicate()):
            torch.manual_seed(0)
            dense = Stack(case).to(device())
            wrapped = RotatedTensorParallel(
                deepcopy(dense),
                policy=_policy(bias=bias_rule if dense.layer.bias is not None else None),
            )
            results = []
            for model in (dense, wrapped):
                x = _random(2, case.inputs, *case.sizes, seed=0).to(device(), torch.float32)
                with _ieee():
                    y = model(x.requires_grad_())
                    mean_square(y).backward()
                results.append(_tensors(model, y, x.grad))
            for theirs, ours in zip(*results, strict=True):
                assert torch.equal(theirs, ours), str(case)


def test_one_rank_computes_bit_for_bit_what_the_dense_layer_does() -> None:
    run_ranks(1, _exact)


def _errors(kind: str, transposed: bool, dim: int) -> dict[str, tuple[float, float]]:
    """Relative distances to the fp64 layer, by tensor: (ours, those of a dense layer in dtype)."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    dtype, own = PRECISIONS[kind]
    torch.manual_seed(0)
    low = CONVS[transposed][1](24, 24, 3, groups=2, dtype=own, device=device())
    truth = deepcopy(low).double()
    precision = MixedPrecisionPolicy(param_dtype=dtype) if kind == "mixed" else None
    ours = RotatedTensorParallel(
        deepcopy(low), policy=_policy(dim, 4096), mixed_precision=precision
    )
    if kind == "mixed":
        low = low.to(dtype)
    context = torch.autocast(DEVICE_TYPE, dtype, enabled=kind == "autocast")

    def run(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
        x = x.detach().requires_grad_()
        y = model(x)
        y.to(torch.promote_types(y.dtype, torch.float32)).sin().mean().backward()
        assert x.grad is not None
        return [y.detach(), x.grad]

    parts = [_random(3, 24, 4, 4, seed=r).to(device(), own) for r in range(world_size)]
    mine = slice(3 * rank, 3 * rank + 3)
    with context, _ieee():
        own_results = run(ours, parts[rank])
        dense = [each[mine] for each in run(low, torch.cat(parts).to(low.weight.dtype))]
    assert own_results[0].dtype == dtype
    exact = [each[mine] for each in run(truth, torch.cat(parts).double())]
    dense[1], exact[1] = dense[1] * world_size, exact[1] * world_size  # of this rank's own mean
    for model, tensors in ((ours, own_results), (low, dense), (truth, exact)):
        tensors += fulls(p.grad for p in model.parameters())
    for parameter in ours.parameters():
        assert parameter.dtype == parameter.grad.dtype == own

    def error(tensor: torch.Tensor, true: torch.Tensor) -> float:
        assert tensor.isfinite().all()
        return float((tensor.double() - true).norm() / true.norm())

    names = ["y", "dx", *[name for name, _ in low.named_parameters()]]
    return {
        name: (error(a, c), error(b, c))
        for name, a, b, c in zip(names, own_results, dense, exact, strict=True)
    }


#: What it computes in, and what the parameters are in.
PRECISIONS = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "autocast": (torch.bfloat16, torch.float32),
    "mixed": (torch.bfloat16, torch.float32),
}


@multi_world_sizes
@pytest.mark.parametrize("kind", PRECISIONS)
def test_low_precision_is_as_precise_as_in_the_dense_layer(world_size: int, kind: str) -> None:
    """Compared with the dense layer of the same dtype; both by their distance to fp64.

    Twice the dense layer's, since for other shapes a library may choose a kernel that sums in
    another order. And a convolution rounds to dtype when it writes: half an epsilon. Here a sum
    over tiles (y along one dim, dx along the other) or over ranks (dW, averaged biases) is written
    several times, which rounds partial sums too; they are smaller and independent, and an epsilon
    more is allowed.
    """
    for transposed in (False, True):
        for dim in (0, 1):
            for errors in run_ranks(world_size, _errors, kind, transposed, dim):
                for name, (ours, dense) in errors.items():
                    assert ours <= 2 * dense + torch.finfo(PRECISIONS[kind][0]).eps, name


# What is rotated, and what is not.


class Patched(nn.Conv2d):
    def _conv_forward(self, input: torch.Tensor, weight: Any, bias: Any) -> torch.Tensor:
        return super()._conv_forward(2 * input, weight, bias)


class Overridden(nn.ConvTranspose1d):
    def forward(self, input: torch.Tensor, output_size: Any = None) -> torch.Tensor:
        return super().forward(2 * input, output_size)


class Renamed(nn.Conv1d):
    """A subclass that computes what its base does."""


def _check_subclasses() -> None:
    for build, shape, form in (
        (lambda: Patched(3, 5, 2), (2, 3, 3, 3), None),
        (lambda: Overridden(3, 5, 2), (2, 3, 3), None),
        (lambda: Renamed(3, 5, 2), (2, 3, 3), RotatedConv),
        (_ran_lazy, (2, 3, 3), RotatedConv),
    ):
        wrapped = check_parity(
            build,
            lambda step, rank, shape=shape: (_random(*shape, seed=10 * step + rank),),
            policy=ShardingPolicy(replicate_below=0),
        )
        rotated = isinstance(wrapped.module, RotatedConv | RotatedConvTranspose)
        assert rotated == (form is not None)
        assert form is None or isinstance(wrapped.module, form)
    with pytest.raises(ValueError, match=r"has no shape yet: run the lazy module once"):
        RotatedTensorParallel(nn.LazyConv1d(5, 2))


def _ran_lazy() -> nn.Module:
    layer = nn.LazyConv1d(5, 2)
    layer(torch.zeros(2, 3, 3))
    return layer


@few_world_sizes
def test_subclasses_that_compute_something_else_are_gathered(world_size: int) -> None:
    run_ranks(world_size, _check_subclasses)


def _check_default_policy() -> None:
    for build in ALL:
        layer = build(128, 130, 3, device=device())
        RotatedTensorParallel(layer)
        form = RotatedConvTranspose if build in CONVS[True] else RotatedConv
        dim = 1 if build in CONVS[True] else 0
        assert isinstance(layer, form | build)
        assert layer._adoption.strategies == {"weight": Rotate(dim), "bias": Replicate()}
        assert f"weight: Rotate(dim={dim}), 1/{dist.get_world_size()} per rank" in repr(layer)


@all_world_sizes
def test_every_kind_is_rotated_by_default_along_its_output_channels(world_size: int) -> None:
    run_ranks(world_size, _check_default_policy)


def _change_options() -> None:
    """Users do, of pretrained models; torch reads them at every forward, and takes numbers."""

    def build() -> nn.Module:
        layer = nn.Conv2d(3, 5, 3, padding="same")
        layer.dilation, layer.stride, layer.padding = (1, 2), 2, 1
        return layer

    check_parity(
        build,
        lambda step, rank: (_random(2, 3, 5, 6, seed=10 * step + rank),),
        policy=_policy(),
    )


@multi_world_sizes
def test_options_may_be_changed_after_construction(world_size: int) -> None:
    run_ranks(world_size, _change_options)


# Errors: on all ranks alike, naming the layer, and leaving everything usable.


def _wrapped(transposed: bool = False) -> tuple[nn.Module, RotatedTensorParallel]:
    torch.manual_seed(0)
    dense = nn.Sequential(_two(transposed), nn.Conv2d(8, 3, 1)).to(device(), torch.float64)
    return dense, RotatedTensorParallel(deepcopy(dense), policy=_policy(staging_bytes=TINY))


def _still_works(dense: nn.Module, wrapped: RotatedTensorParallel) -> None:
    for parameter in (*dense.parameters(), *wrapped.parameters()):
        parameter.grad = None
    x = _random(2, 6, 4, 3, seed=0).to(device())
    for model in (dense, wrapped):
        mean_square(model(x)).backward()
        sgd(model.parameters()).step()
    for theirs, ours in zip(_tensors(dense), _tensors(wrapped), strict=True):
        torch.testing.assert_close(ours, theirs, **FP64)


def _wrong_inputs() -> None:
    for transposed in (False, True):
        dense, wrapped = _wrapped(transposed)
        long = torch.zeros(2, 6, 4, 3, dtype=torch.long, device=device())
        for x, error, message in (
            (
                torch.zeros(2, 7, 4, 3),
                ValueError,
                r"^0: input of shape \(2, 7, 4, 3\) .*6 input ch",
            ),
            (torch.zeros(7, 4, 3), ValueError, r"^0: input of shape \(7, 4, 3\) "),
            (torch.zeros(6, 3), ValueError, r"^0: input of shape \(6, 3\)"),
            (torch.zeros(1, 2, 6, 4, 3), ValueError, r"^0: input of shape \(1, 2, 6, 4, 3\)"),
            (torch.zeros(2, 6, 0, 3), ValueError, r"^0: input of shape .* is too small for a kern"),
            (torch.zeros(2, 6, 4, 3), TypeError, r"^0: input is torch.float32 but .*float64; conv"),
            (long, TypeError, r"^0: input is torch.int64 but"),
        ):
            with (
                no_communication(),
                pytest.raises(error, match=message),
            ):
                wrapped(x.to(device()))
        if not transposed:
            with pytest.raises(ValueError, match=r"too small .* size \(0, 2\)"):
                wrapped(torch.zeros(2, 6, 2, 3, dtype=torch.float64, device=device()))
        with (
            torch.autocast(DEVICE_TYPE, torch.bfloat16),
            pytest.raises(TypeError, match=r"^0: input is torch.int64"),
        ):
            wrapped(long)
        _still_works(dense, wrapped)


@multi_world_sizes
def test_wrong_inputs_are_refused_by_name_before_anything_is_sent(world_size: int) -> None:
    run_ranks(world_size, _wrong_inputs)


def _misuse_backward() -> None:
    for transposed in (False, True):
        dense, wrapped = _wrapped(transposed)
        x = _random(2, 6, 4, 3, seed=0).to(device()).requires_grad_()
        loss = mean_square(wrapped(x))
        with pytest.raises(RuntimeError, match=r"^1: double backward \(create_graph=True\) is not"):
            torch.autograd.grad(loss, x, create_graph=True)
        _still_works(dense, wrapped)
        loss = mean_square(wrapped(x))
        for model in (dense, wrapped):
            with torch.no_grad():
                model.get_parameter("0.weight").mul_(2)
        with pytest.raises(RuntimeError, match=r"^0\S* was written"):
            loss.backward()
        _still_works(dense, wrapped)


@multi_world_sizes
def test_double_backward_and_writes_before_backward_are_refused_by_name(world_size: int) -> None:
    run_ranks(world_size, _misuse_backward)


def _too_large_a_kernel() -> None:
    layer = nn.Sequential(nn.Conv3d(2, 3, 5)).to(device(), torch.float64)
    with pytest.raises(
        ValueError, match=r"^0.weight of shape \(3, 2, 5, 5, 5\) .* of 125 el.*least 4096; .* 1024"
    ):
        RotatedTensorParallel(layer, policy=_policy(staging_bytes=TINY))
    case = Case(nn.Conv3d, 2, 3, 5, (5, 5, 6))
    for dim in (0, 1):
        _train(case, dim=dim, staging_bytes=4096)


@multi_world_sizes
def test_the_staging_must_hold_a_kernel(world_size: int) -> None:
    run_ranks(world_size, _too_large_a_kernel)
