"""`nn.Linear` on a rotating weight, against the dense layer on the whole batch in one process.

Also runs as ranks of a job: `torchrun --nproc_per_node=2 -m pytest tests/test_linear.py`, or
`python -m torch.distributed.launch --nproc_per_node=2 tests/test_linear.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import pytest

if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))

import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from rtp_wrap import Gather, Replicate, Rotate, RotatedTensorParallel, ShardingPolicy
from rtp_wrap.hops import Rotation
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
from tests.rotated import TINY, by_ring, dims, modes, no_communication


def _policy(dim: int = 0, staging_bytes: int | None = None, bias: Any = None) -> ShardingPolicy:
    """Small layers too; the bias is replicated (being small) unless a rule is given for it."""
    rules: dict[Any, Any] = {} if bias is None else {"*bias": bias}
    return ShardingPolicy(rules={**rules, nn.Linear: Rotate(dim)}, staging_bytes=staging_bytes)


def _mlp(sizes: tuple[int, ...], bias: bool = True) -> nn.Sequential:
    """Linear layers with tanh between: the input of the first needs no gradient, others do."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs, bias), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def _random(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _train(
    sizes: tuple[int, ...],
    *,
    bias: bool = True,
    dim: int = 0,
    inplace: bool = False,
    staging_bytes: int | None = None,
    rows: int = 3,
    steps: int = 3,
    bias_rule: Any = None,
) -> None:
    check_parity(
        lambda: _mlp(sizes, bias),
        lambda step, rank: (_random(rows, sizes[0], seed=10 * step + rank),),
        steps=steps,
        policy=_policy(dim, staging_bytes, bias_rule),
        inplace=inplace,
    )


@all_world_sizes
@modes
@dims
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_training_is_that_of_the_dense_model(
    world_size: int, bias: bool, dim: int, inplace: bool
) -> None:
    run_ranks(world_size, _train, (7, 10, 6), bias=bias, dim=dim, inplace=inplace, steps=5)


@all_world_sizes
@dims
@pytest.mark.parametrize(
    "sizes",
    [
        (5, 3, 2, 1, 4),  # fewer rows or columns than ranks, in some layers a single one
        (1, 1),
        (8, 8, 8),  # even
        (9, 13, 5),  # uneven: 4, 4, 4, 1 rows of 13
    ],
    ids=str,
)
def test_any_size_is_right(world_size: int, dim: int, sizes: tuple[int, ...]) -> None:
    run_ranks(world_size, _train, sizes, dim=dim)


def _is_cut_in_both_directions(world_size: int, dim: int, sizes: tuple[int, int]) -> bool:
    shape = (sizes[1], sizes[0])
    grid = TileGrid(shape, dim, world_size, TINY // 4 // torch.float64.itemsize)
    rows, cols = grid.shard(0).shape
    return grid.cell[0] < rows and grid.cell[1] < cols


@all_world_sizes
@modes
@dims
def test_a_row_larger_than_a_slot_is_cut(world_size: int, dim: int, inplace: bool) -> None:
    sizes = (150, 11, 140)
    assert _is_cut_in_both_directions(world_size, dim, sizes[:2])
    for staging_bytes in (TINY, 3000, 50_000):
        run_ranks(world_size, _train, sizes, dim=dim, inplace=inplace, staging_bytes=staging_bytes)


@all_world_sizes
@pytest.mark.parametrize("rule", [Gather(), Replicate()])
def test_a_bias_may_be_gathered_or_replicated(world_size: int, rule: Any) -> None:
    run_ranks(world_size, _train, (7, 5, 6), bias_rule=rule)


@given(
    world_size=st.sampled_from(WORLD_SIZES),
    sizes=st.lists(st.integers(1, 40), min_size=2, max_size=3).map(tuple),
    bias=st.booleans(),
    dim=st.sampled_from([0, 1]),
    inplace=st.booleans(),
    staging_bytes=st.integers(TINY, 8 * TINY),
    rows=st.integers(1, 5),
)
def test_training_is_right_whatever_the_options(world_size: int, **options: Any) -> None:
    run_ranks(world_size, _train, steps=2, **options)


# Inputs of all kinds, where the oracle is DDP's promise: the mean of the ranks' own gradients.

#: The input of a rank, for a layer with 6 input features.
INPUTS: dict[str, Callable[[int], torch.Tensor]] = {
    "1-D": lambda rank: _random(6, seed=rank),
    "2-D": lambda rank: _random(4, 6, seed=rank),
    "3-D": lambda rank: _random(2, 3, 6, seed=rank),
    "4-D": lambda rank: _random(2, 1, 3, 6, seed=rank),
    "transposed": lambda rank: _random(6, 4, seed=rank).t(),
    "strided 3-D": lambda rank: _random(3, 5, 12, seed=rank).transpose(0, 1)[..., ::2],
    "expanded": lambda rank: _random(1, 6, seed=rank).expand(5, 6),
    "of another length on each rank": lambda rank: _random(3 * rank + 1, 6, seed=rank),
    "empty on rank 0": lambda rank: _random(2 * rank, 6, seed=rank),
    "empty on all ranks": lambda rank: _random(0, 6, seed=rank),
    "empty 3-D": lambda rank: _random(0, 3, 6, seed=rank),
    "of empty sequences": lambda rank: _random(3, 0, 6, seed=rank),
}


def _check_mean_of_gradients(
    kind: str,
    *,
    dim: int = 0,
    inplace: bool = False,
    needs_dx: bool = True,
    frozen: tuple[str, ...] = (),
    staging_bytes: int = TINY,
    loss: Callable[[torch.Tensor], torch.Tensor] = lambda y: y.sin().sum(),
) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    dense = nn.Linear(6, 29, dtype=torch.float64, device=device())
    for name, parameter in dense.named_parameters():
        parameter.requires_grad_(name not in frozen)
    wrapped = RotatedTensorParallel(
        deepcopy(dense), inplace=inplace, policy=_policy(dim, staging_bytes)
    )
    everyone = [INPUTS[kind](r).to(device()).requires_grad_(needs_dx) for r in range(world_size)]
    x = everyone[rank].detach().requires_grad_(needs_dx)
    y = wrapped(x)
    for r, theirs in enumerate(everyone):
        expected = dense(theirs)
        if r == rank:
            torch.testing.assert_close(y, expected, **FP64)
        if expected.requires_grad:
            (loss(expected) / world_size).backward()
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


@all_world_sizes
@pytest.mark.parametrize("kind", INPUTS)
@dims
def test_an_input_may_be(world_size: int, dim: int, kind: str) -> None:
    run_ranks(world_size, _check_mean_of_gradients, kind, dim=dim)


@all_world_sizes
@pytest.mark.parametrize("frozen", [(), ("weight",), ("bias",), ("weight", "bias")])
@modes
@pytest.mark.parametrize("needs_dx", [True, False], ids=["dx", "no dx"])
def test_only_what_requires_gradients_gets_them(
    world_size: int, inplace: bool, needs_dx: bool, frozen: tuple[str, ...]
) -> None:
    for dim in (0, 1):
        run_ranks(
            world_size, _check_mean_of_gradients, "3-D", dim=dim, inplace=inplace,
            needs_dx=needs_dx, frozen=frozen,
        )  # fmt: skip


def _of_transposed(y: torch.Tensor) -> torch.Tensor:
    return y.transpose(0, 1).contiguous().sin().sum()


@all_world_sizes
@pytest.mark.parametrize("loss", [torch.sum, _of_transposed], ids=["expanded", "transposed"])
def test_the_gradient_of_the_output_may_be(world_size: int, loss: Any) -> None:
    run_ranks(world_size, _check_mean_of_gradients, "3-D", loss=loss)


def _train_in_poisoned_memory() -> None:
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        assert torch.empty(1).isnan()
        for dim in (0, 1):
            _train((40, 11, 5), dim=dim, staging_bytes=TINY, steps=2)
            _check_mean_of_gradients("empty on rank 0", dim=dim)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.skipif(DEVICE_TYPE != "cpu", reason="on CUDA the mode needs an environment variable")
@all_world_sizes
def test_memory_is_written_before_it_is_read(world_size: int) -> None:
    run_ranks(world_size, _train_in_poisoned_memory)


def _saved(frozen: bool) -> int:
    model = nn.Linear(6, 5, device=device())
    model.weight.requires_grad_(not frozen)
    wrapped = RotatedTensorParallel(model, policy=_policy())
    x = torch.randn(7, 6, device=device(), requires_grad=True)
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
    assert run_ranks(world_size, _saved, frozen=False) == [1] * world_size
    assert run_ranks(world_size, _saved, frozen=True) == [0] * world_size


class Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(9, 9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.linear(x).tanh()) + self.linear(-x)


def _reuse(dim: int, inplace: bool) -> None:
    check_parity(
        Reused,
        lambda step, rank: (_random(3, 9, seed=10 * step + rank),),
        policy=_policy(dim, TINY),
        inplace=inplace,
    )


@all_world_sizes
@modes
@dims
def test_a_layer_may_be_used_several_times_in_a_forward(
    world_size: int, dim: int, inplace: bool
) -> None:
    run_ranks(world_size, _reuse, dim, inplace)


def _tensors(model: nn.Module, *others: torch.Tensor) -> list[torch.Tensor]:
    parameters = fulls(p.detach() for p in model.parameters())
    return [*others, *fulls(p.grad for p in model.parameters()), *parameters]


def _exact(dtype: torch.dtype, dim: int, bias_rule: Any, autocast: bool) -> None:
    torch.manual_seed(0)
    dense = _mlp((7, 12, 5)).to(device(), dtype)
    wrapped = RotatedTensorParallel(deepcopy(dense), policy=_policy(dim, bias=bias_rule))
    optimizers = [sgd(model.parameters()) for model in (dense, wrapped)]
    for step in range(3):
        results = []
        for model, optimizer in zip((dense, wrapped), optimizers, strict=True):
            x = _random(4, 7, seed=step).to(device(), dtype).requires_grad_()
            with torch.autocast(DEVICE_TYPE, torch.bfloat16, enabled=autocast):
                y = model(x)
            optimizer.zero_grad()
            mean_square(y).backward()
            optimizer.step()
            results.append(_tensors(model, y, x.grad))
        for theirs, ours in zip(*results, strict=True):
            assert torch.equal(theirs, ours)


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_one_rank_computes_bit_for_bit_what_the_dense_layer_does(
    dtype: torch.dtype, autocast: bool
) -> None:
    for dim in (0, 1):
        for bias_rule in (Gather(), Replicate()):
            run_ranks(1, _exact, dtype, dim, bias_rule, autocast)


def _against_ddp() -> dict[str, tuple[float, float]]:
    """Distances to the fp64 model after 5 steps, by parameter: (ours, DDP's)."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    sizes, rows = (48, 96, 40, 10), 8
    torch.manual_seed(0)
    model = _mlp(sizes).to(device())
    models = {
        "dense": deepcopy(model).double(),
        "ddp": DistributedDataParallel(deepcopy(model)),
        "ours": RotatedTensorParallel(deepcopy(model), policy=_policy(staging_bytes=4096)),
    }
    optimizers = {key: sgd(each.parameters()) for key, each in models.items()}
    for step in range(5):
        parts = [_random(rows, 48, seed=10 * step + r).to(device()) for r in range(world_size)]
        mine = parts[rank].float()
        inputs = {"dense": torch.cat(parts), "ddp": mine, "ours": mine}
        for key, each in models.items():
            optimizers[key].zero_grad()
            mean_square(each(inputs[key])).backward()
            optimizers[key].step()
    truth, ddp, ours = (
        [full(p.detach()).double() for p in each.parameters()] for each in models.values()
    )
    return {
        name: (float((a - c).norm()), float((b - c).norm()))
        for (name, _), a, b, c in zip(model.named_parameters(), ours, ddp, truth, strict=True)
    }


@all_world_sizes
def test_in_fp32_the_error_is_that_of_ddp(world_size: int) -> None:
    """Within ten times DDP's distance to the single-process model, for every parameter.

    The single-process model is taken in fp64, so that the distances are errors. To the fp32 one
    they would be differences of two roundings, and where DDP happens to round as it does (always
    with one rank) its distance is 0 and ten times that too.
    """
    for distances in run_ranks(world_size, _against_ddp):
        for name, (ours, ddp) in distances.items():
            assert 0 < ddp < 1e-5, name
            assert ours <= 10 * ddp, name


def _errors(
    dtype: torch.dtype, dim: int, inplace: bool, autocast: bool
) -> dict[str, tuple[float, float]]:
    """Relative distances to the fp64 layer, by tensor: (ours, those of a dense layer in dtype)."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    low = nn.Linear(64, 50, dtype=torch.float32 if autocast else dtype, device=device())
    truth = deepcopy(low).double()
    ours = RotatedTensorParallel(deepcopy(low), inplace=inplace, policy=_policy(dim, 4096))
    context = torch.autocast(DEVICE_TYPE, dtype, enabled=autocast)

    def run(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
        x = x.detach().requires_grad_()
        y = model(x)
        y.to(torch.promote_types(y.dtype, torch.float32)).sin().mean().backward()
        assert x.grad is not None
        return [y.detach(), x.grad]

    parts = [_random(16, 64, seed=r).to(device(), low.weight.dtype) for r in range(world_size)]
    mine = slice(16 * rank, 16 * rank + 16)
    with context:
        own = run(ours, parts[rank])
        dense = [each[mine] for each in run(low, torch.cat(parts))]
    exact = [each[mine] for each in run(truth, torch.cat(parts).double())]
    dense[1], exact[1] = dense[1] * world_size, exact[1] * world_size  # of this rank's own mean
    for model, tensors in ((ours, own), (low, dense), (truth, exact)):
        tensors += fulls(p.grad for p in model.parameters())

    def error(tensor: torch.Tensor, true: torch.Tensor) -> float:
        assert tensor.isfinite().all()
        return float((tensor.double() - true).norm() / true.norm())

    names = ["y", "dx", *[name for name, _ in low.named_parameters()]]
    return {
        name: (error(a, c), error(b, c))
        for name, a, b, c in zip(names, own, dense, exact, strict=True)
    }


#: The dtype of products, and whether autocast chooses it.
LOW_PRECISION = {
    "fp32": (torch.float32, False),
    "bf16": (torch.bfloat16, False),
    "fp16": (torch.float16, False),
    "autocast to bf16": (torch.bfloat16, True),
}


@all_world_sizes
@pytest.mark.parametrize("name", LOW_PRECISION)
@dims
def test_low_precision_is_as_precise_as_in_the_dense_layer(
    world_size: int, dim: int, name: str
) -> None:
    """Compared with the dense layer of the same dtype; both by their distance to fp64.

    A GEMM rounds to dtype once, when it writes: half an epsilon. Here a sum over tiles (y for dim
    1, dx for dim 0) or over ranks (dW, averaged biases) is written several times, which rounds
    partial sums too; they are smaller and independent, and an epsilon more is allowed for them.
    """
    dtype, autocast = LOW_PRECISION[name]
    for inplace in (False, True):
        for errors in run_ranks(world_size, _errors, dtype, dim, inplace, autocast):
            for what, (ours, dense) in errors.items():
                assert ours <= dense + torch.finfo(dtype).eps, what


def _large_gradients() -> None:
    world_size = dist.get_world_size()
    wrapped = RotatedTensorParallel(
        nn.Linear(3, 5, bias=False, dtype=torch.float16, device=device()), policy=_policy()
    )
    x = torch.full((1, 3), 200.0, dtype=torch.float16, device=device())
    (wrapped(x) * 200).sum().backward()
    grad = full(wrapped.weight.grad)
    # Exact but for the rounding of 1/N and of the partial sums: an epsilon for each.
    expected = torch.full_like(grad, 40_000)
    epsilon = torch.finfo(torch.float16).eps
    torch.testing.assert_close(grad, expected, rtol=world_size * epsilon, atol=0)


@all_world_sizes
def test_a_mean_that_fp16_can_hold_does_not_overflow_as_a_sum(world_size: int) -> None:
    run_ranks(world_size, _large_gradients)


def _evaluate_then_train(dim: int, inplace: bool) -> None:
    torch.manual_seed(0)
    dense = _mlp((9, 70, 5)).to(device(), torch.float64)
    wrapped = RotatedTensorParallel(
        deepcopy(dense), inplace=inplace, policy=_policy(dim, TINY, bias=Gather())
    )
    optimizers = [sgd(model.parameters()) for model in (dense, wrapped)]
    # The same data on all ranks: then the mean over ranks is the dense gradient.
    for step in range(3):
        x = _random(3, 9, seed=step).to(device())
        for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
            with mode():
                torch.testing.assert_close(wrapped(x), dense(x), **FP64)
        wrapped.train(step % 2 == 0)
        for model, optimizer in zip((dense, wrapped), optimizers, strict=True):
            optimizer.zero_grad()
            mean_square(model(x)).backward()
            optimizer.step()
        for theirs, ours in zip(_tensors(dense), _tensors(wrapped), strict=True):
            torch.testing.assert_close(ours, theirs, **FP64)


@all_world_sizes
@modes
@dims
def test_training_goes_on_after_evaluation(world_size: int, dim: int, inplace: bool) -> None:
    run_ranks(world_size, _evaluate_then_train, dim, inplace)


# Errors: on all ranks alike, naming the layer, and leaving everything usable.


def _wrapped(dim: int = 0, inplace: bool = False) -> tuple[nn.Module, RotatedTensorParallel]:
    torch.manual_seed(0)
    dense = _mlp((6, 31, 5)).to(device(), torch.float64)
    wrapped = RotatedTensorParallel(deepcopy(dense), inplace=inplace, policy=_policy(dim, TINY))
    return dense, wrapped


def _still_works(dense: nn.Module, wrapped: RotatedTensorParallel) -> None:
    for parameter in (*dense.parameters(), *wrapped.parameters()):
        parameter.grad = None
    x = _random(3, 6, seed=0).to(device())
    for model in (dense, wrapped):
        optimizer = sgd(model.parameters())
        mean_square(model(x)).backward()
        optimizer.step()
    for theirs, ours in zip(_tensors(dense), _tensors(wrapped), strict=True):
        torch.testing.assert_close(ours, theirs, **FP64)


def _wrong_inputs() -> None:
    dense, wrapped = _wrapped()
    for x, error, message in (
        (torch.zeros(3, 7), ValueError, r"^0: input of shape \(3, 7\) .* 6 input features"),
        (torch.zeros(6, 3), ValueError, r"^0: input of shape \(6, 3\)"),
        (torch.tensor(1.0), ValueError, r"^0: input of shape \(\) "),
        (torch.zeros(3, 6), TypeError, r"^0: input is torch.float32 but .*float64; convert"),
        (torch.zeros(3, 6, dtype=torch.long), TypeError, r"^0: input is torch.int64 but"),
    ):
        with (
            no_communication(),
            pytest.raises(error, match=message),
        ):
            wrapped(x.to(device()))
        _still_works(dense, wrapped)
    with (
        torch.autocast(DEVICE_TYPE, torch.bfloat16),
        pytest.raises(TypeError, match=r"^0: input is torch.int64"),
    ):
        wrapped(torch.zeros(3, 6, dtype=torch.long, device=device()))
    lone = RotatedTensorParallel(nn.Linear(6, 5, device=device()), policy=_policy())
    with pytest.raises(ValueError, match=r"^the root Linear: input of shape"):
        lone(torch.zeros(3, 7, device=device()))


@multi_world_sizes
def test_wrong_inputs_are_refused_by_name_before_anything_is_sent(world_size: int) -> None:
    run_ranks(world_size, _wrong_inputs)


def _differentiate_twice() -> None:
    dense, wrapped = _wrapped()
    x = _random(3, 6, seed=0).to(device()).requires_grad_()
    loss = mean_square(wrapped(x))
    with pytest.raises(RuntimeError, match=r"^2: double backward \(create_graph=True\) is not su"):
        torch.autograd.grad(loss, x, create_graph=True)
    _still_works(dense, wrapped)


@multi_world_sizes
def test_double_backward_is_refused_by_name(world_size: int) -> None:
    run_ranks(world_size, _differentiate_twice)


def _write_before_backward() -> None:
    dense, wrapped = _wrapped()
    x = _random(3, 6, seed=0).to(device())
    loss = mean_square(wrapped(x))
    for model in (dense, wrapped):
        with torch.no_grad():
            model.get_parameter("2.weight").mul_(2)
    with pytest.raises(RuntimeError, match=r"^2\S* was written"):
        loss.backward()
    _still_works(dense, wrapped)


@multi_world_sizes
def test_a_weight_written_between_forward_and_backward_is_refused_by_name(world_size: int) -> None:
    run_ranks(world_size, _write_before_backward)


@by_ring
def _raise_inside(at: int, inplace: bool) -> None:
    dense, wrapped = _wrapped(inplace=inplace)
    x = _random(3, 6, seed=0).to(device())
    turn, turns = Rotation.turn, 0

    @contextmanager
    def raising(*args: Any) -> Iterator[None]:
        nonlocal turns
        turns += 1
        with turn(*args):
            yield
            if turns == at:
                raise MemoryError("as if it were out of memory")

    with patch.object(Rotation, "turn", raising), pytest.raises(MemoryError):
        mean_square(wrapped(x)).backward()
    _still_works(dense, wrapped)


@multi_world_sizes
@modes
def test_after_an_exception_on_all_ranks_training_goes_on(world_size: int, inplace: bool) -> None:
    """In the forward of the first layer, in that of the second one, and in backward."""
    # A layer takes at least world_size turns in forward, and as many in backward.
    for at in (1, 2, 2 * world_size, 3 * world_size):
        run_ranks(world_size, _raise_inside, at, inplace)


def _descriptions() -> list[str]:
    linears = [nn.Linear(6, 5, device=device()) for _ in range(2)]
    for dim, linear in enumerate(linears):
        RotatedTensorParallel(linear, policy=_policy(dim))
    return [repr(linear) for linear in linears]


@all_world_sizes
def test_the_repr_shows_the_sharding(world_size: int) -> None:
    expected = [
        f"Linear(in_features=6, out_features=5, bias=True, "
        f"weight: Rotate(dim={dim}), 1/{world_size} per rank)"
        for dim in (0, 1)
    ]
    assert run_ranks(world_size, _descriptions) == [expected] * world_size
