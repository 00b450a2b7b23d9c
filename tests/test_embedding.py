"""`nn.Embedding` and `nn.EmbeddingBag` on a rotating weight, against the dense layers.

Also runs as ranks of a job: `torchrun --nproc_per_node=2 -m pytest tests/test_embedding.py`, or
`python -m torch.distributed.launch --nproc_per_node=2 tests/test_embedding.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any
from unittest.mock import patch

import pytest

if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))

import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rtp_wrap import (
    Gather,
    Ignore,
    MixedPrecisionPolicy,
    Replicate,
    Rotate,
    RotatedTensorParallel,
    ShardingPolicy,
)
from rtp_wrap.modules import Rotated, rotation_dim
from rtp_wrap.modules.embedding import RotatedEmbedding, RotatedEmbeddingBag
from rtp_wrap.shard import TileGrid
from rtp_wrap.transport import PointToPoint
from tests.parity import FP64, check_parity, full, mean_square, sgd
from tests.ranks import (
    DEVICE_TYPE,
    WORLD_SIZES,
    all_world_sizes,
    device,
    multi_world_sizes,
    run_ranks,
)
from tests.rotated import TINY, by_ring, dims, no_communication

FORMS = (RotatedEmbedding, RotatedEmbeddingBag)

#: A rank's arguments of a layer.
Arguments = Callable[[int], tuple[torch.Tensor | None, ...]]


def _policy(dim: int = 0, staging_bytes: int = TINY) -> ShardingPolicy:
    rules = {"*": Rotate(dim)} if dim else {}  # by rows is the default
    return ShardingPolicy(rules=rules, replicate_below=0, staging_bytes=staging_bytes)


def _ids(*shape: int, rows: int, seed: int) -> torch.Tensor:
    return torch.randint(rows, shape, generator=torch.Generator().manual_seed(seed))


def _random(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _own(arguments: tuple[torch.Tensor | None, ...]) -> list[torch.Tensor | None]:
    """The arguments on this rank's device, as new leaves, floating ones requiring a gradient."""
    return [
        None
        if each is None
        else each.to(device()).detach().requires_grad_(each.is_floating_point())
        for each in arguments
    ]


def _check(
    layer: nn.Module,
    arguments: Arguments,
    *,
    dim: int = 0,
    inplace: bool = False,
    staging_bytes: int = TINY,
) -> None:
    """DDP's promise, for batches of any kind: the mean of the ranks' own gradients.

    Forward copies rows, and bags sum them as torch does: bit for bit the dense layer's results.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    dense = deepcopy(layer).to(device(), torch.float64)
    model = nn.Sequential(deepcopy(dense))
    by_hand = isinstance(dense, nn.EmbeddingBag) and dense.scale_grad_by_freq
    if by_hand:  # torch is wrong on the CPU, see RotatedEmbeddingBag
        dense.scale_grad_by_freq = False
    gradient = torch.zeros_like(dense.weight)
    wrapped = RotatedTensorParallel(model, inplace=inplace, policy=_policy(dim, staging_bytes))
    assert isinstance(model[0], FORMS)
    assert model[0]._adoption.strategies == {"weight": Rotate(dim)}
    mine = _own(arguments(rank))
    y = model[0](*mine)
    assert y.requires_grad
    for r in range(world_size):
        theirs = _own(arguments(r))
        expected = dense(*theirs)
        dense.weight.grad = None
        (_loss(expected) / world_size).backward()
        counts = theirs[0].flatten().bincount(minlength=len(gradient)).clamp(min=1)
        gradient += dense.weight.grad / (counts[:, None] if by_hand else 1)
        if r == rank:
            assert torch.equal(y, expected)
            _loss(y).backward()
            for own, other in zip(mine, theirs, strict=True):
                if own is not None and own.is_floating_point():  # not averaged: this rank's own
                    torch.testing.assert_close(own.grad, other.grad * world_size, **FP64)
    torch.testing.assert_close(full(wrapped[0].weight.grad), gradient, **FP64)


def _loss(y: torch.Tensor) -> torch.Tensor:
    """Nonlinear, and another one for each element."""
    weights = torch.linspace(1, 2, y.numel(), dtype=y.dtype, device=y.device)
    return (y.sin().reshape(-1) * weights).sum()


#: Rows and columns; with TINY staging the last three are cut.
SIZES = [(11, 6), (2, 3), (1, 1), (8, 8), (70, 9), (5, 300), (150, 7)]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"padding_idx": 0},
    {"padding_idx": 3},
    {"padding_idx": -1},
    {"scale_grad_by_freq": True},
    {"padding_idx": 5, "scale_grad_by_freq": True},
]
#: The input of a rank, for a table of 11 rows.
INPUTS: list[Callable[[int], torch.Tensor]] = [
    lambda rank: _ids(rows=11, seed=rank),  # one id, 0-D
    lambda rank: _ids(2, 3, 4, rows=11, seed=rank),
    lambda rank: _ids(9, rows=11, seed=rank).int(),
    lambda rank: _ids(6, 4, rows=11, seed=rank).t(),
    lambda rank: _ids(5, 8, rows=11, seed=rank)[:, ::3],
    lambda rank: torch.tensor([rank]).expand(7),
    lambda rank: _ids(3 * rank + 1, rows=11, seed=rank),
    lambda rank: _ids(2 * rank, rows=11, seed=rank),  # none on rank 0
    lambda rank: _ids(0, 4, rows=11, seed=rank),  # none at all
]


def _table(rows: int, cols: int, **options: Any) -> nn.Embedding:
    layer = nn.Embedding(rows, cols, **options)
    nn.init.normal_(layer.weight)  # the padding's row too: forward reads it
    return layer


def _random_ids(rows: int) -> Arguments:
    return lambda rank: (_ids(4, 9, rows=rows, seed=rank),)


def _check_embeddings(dim: int, inplace: bool) -> None:
    for rows, cols in SIZES:
        layer = _table(rows, cols, padding_idx=rows - 1)
        _check(layer, _random_ids(rows), dim=dim, inplace=inplace)
    if inplace:
        return  # what follows makes no difference to the loop
    for options in OPTIONS:
        _check(_table(11, 6, **options), _random_ids(11), dim=dim)
    for kind in INPUTS:
        layer = _table(11, 6, padding_idx=2)
        _check(layer, lambda rank, kind=kind: (kind(rank),), dim=dim)


@all_world_sizes
@pytest.mark.parametrize("inplace", [False, True])
@dims
def test_sizes_options_and_inputs_of_an_embedding(world_size: int, dim: int, inplace: bool) -> None:
    run_ranks(world_size, _check_embeddings, dim, inplace)


@multi_world_sizes
@dims
def test_the_sizes_include_tables_cut_by_rows_and_by_columns(world_size: int, dim: int) -> None:
    cuts = set()
    for shape in SIZES:
        grid = TileGrid(shape, dim, world_size, TINY // 2 // torch.float64.itemsize)
        rows, cols = grid.shard(0).shape
        cuts.add((grid.cell[0] < rows, grid.cell[1] < cols))
    assert {(False, False), (True, False), (True, True)} <= cuts


# Bags.

#: Bags of 4, 0, 3 and 5 ids in turn, ended by the last offset or not, and ids in no bag at all.
OFFSETS = torch.tensor([0, 4, 4, 7])
ENDS = torch.tensor([0, 4, 4, 7, 12])


def _weighted(*shape: int) -> Arguments:
    return lambda rank: (_ids(*shape, rows=11, seed=rank), None, _random(*shape, seed=rank))


BAGS: list[tuple[dict[str, Any], Arguments]] = [
    ({}, lambda rank: (_ids(3, 5, rows=11, seed=rank),)),
    ({}, lambda rank: (_ids(12, rows=11, seed=rank), OFFSETS)),
    ({}, lambda rank: (_ids(12, rows=11, seed=rank).int(), OFFSETS.int())),
    ({}, lambda rank: (_ids(4 * rank, 5, rows=11, seed=rank),)),  # none on rank 0
    ({}, lambda rank: (_ids(0, rows=11, seed=rank), torch.zeros(3, dtype=torch.int64))),
    ({"include_last_offset": True}, lambda rank: (_ids(12, rows=11, seed=rank), ENDS)),
    ({"padding_idx": 3}, lambda rank: (_ids(9, 5, rows=11, seed=rank),)),
    ({"padding_idx": -1}, lambda rank: (_ids(12, rows=11, seed=rank).int(), OFFSETS)),
    ({"padding_idx": 0}, lambda rank: (torch.zeros(2, 3, dtype=torch.int64),)),  # nothing else
    ({"padding_idx": 0}, lambda rank: (_ids(0, rows=11, seed=rank), OFFSETS[:1])),
]
SCALED: list[tuple[dict[str, Any], Arguments]] = [
    ({}, lambda rank: (_ids(6, 5, rows=11, seed=rank),)),
    ({"padding_idx": 3}, lambda rank: (_ids(6, 5, rows=11, seed=rank),)),
]
WEIGHTED: list[tuple[dict[str, Any], Arguments]] = [
    ({}, _weighted(3, 5)),
    ({"padding_idx": 3}, _weighted(6, 5)),
    (
        {"include_last_offset": True, "padding_idx": 3},
        lambda rank: (_ids(12, rows=11, seed=rank), ENDS, _random(12, seed=rank)),
    ),
]


def _check_bags(dim: int) -> None:
    for mode in ("sum", "mean", "max"):
        for options, arguments in BAGS:
            layer = nn.EmbeddingBag(11, 6, mode=mode, **options)
            nn.init.normal_(layer.weight)
            _check(layer, arguments, dim=dim)
        # On one rank the layer is torch's, wrong on the CPU; of the maximum torch has none.
        for options, arguments in SCALED if mode != "max" and dist.get_world_size() > 1 else ():
            layer = nn.EmbeddingBag(11, 6, mode=mode, scale_grad_by_freq=True, **options)
            _check(layer, arguments, dim=dim)
    for options, arguments in WEIGHTED:
        layer = nn.EmbeddingBag(11, 6, mode="sum", **options)
        _check(layer, arguments, dim=dim)


@all_world_sizes
@pytest.mark.parametrize("dim", [0, 1])
def test_modes_options_and_inputs_of_a_bag(world_size: int, dim: int) -> None:
    run_ranks(world_size, _check_bags, dim)


def _refuse_as_torch_does() -> None:
    layer = nn.EmbeddingBag(11, 6, mode="max", scale_grad_by_freq=True)
    wrapped = RotatedTensorParallel(nn.Sequential(layer.to(device())), policy=_policy())
    ids = torch.zeros(3, 5, dtype=torch.int64, device=device())
    with pytest.raises(ValueError, match="max mode does not support scaling the gradient"):
        wrapped(ids)
    with pytest.raises(ValueError, match="if input is 2D, then offsets has to be None"):
        wrapped[0](ids, ids[0])


@all_world_sizes
def test_a_bag_refuses_what_torch_refuses(world_size: int) -> None:
    run_ranks(world_size, _refuse_as_torch_does)


@given(
    world_size=st.sampled_from(WORLD_SIZES),
    shape=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    bag=st.booleans(),
    options=st.fixed_dictionaries(
        {"scale_grad_by_freq": st.booleans()}, optional={"padding_idx": st.just(0)}
    ),
    mode=st.sampled_from(["sum", "mean", "max"]),
    batch=st.tuples(st.integers(0, 6), st.integers(1, 6)),
    dim=st.sampled_from([0, 1]),
    inplace=st.booleans(),
    staging_bytes=st.integers(TINY, 8 * TINY),
)
@settings(max_examples=settings().max_examples * 3 // 5)
def test_gradients_are_right_whatever_the_options(world_size: int, **drawn: Any) -> None:
    run_ranks(world_size, _check_drawn, **drawn)


def _check_drawn(
    shape: tuple[int, int],
    bag: bool,
    options: dict[str, Any],
    mode: str,
    batch: tuple[int, int],
    **wrap: Any,
) -> None:
    # For no ids at all torch's own dense gradient launches a kernel on nothing, an error on CUDA.
    options["scale_grad_by_freq"] &= batch[0] > 0
    if bag:
        options["scale_grad_by_freq"] &= mode != "max" and dist.get_world_size() > 1
        layer: nn.Module = nn.EmbeddingBag(*shape, mode=mode, **options)
    else:
        layer = nn.Embedding(*shape, **options)
    _check(layer, lambda rank: (_ids(*batch, rows=shape[0], seed=rank),), **wrap)


# Training, with the layer in all places that a model has for it.


class Chain(nn.Module):
    """Rows of one table, used twice, into a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(31, 6, padding_idx=15)
        self.linear = nn.Linear(6, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.linear(self.embedding(ids) + self.embedding(ids.flip(1)).tanh())


class TiedHead(nn.Module):
    """The table is the head, too, as in most language models."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(31, 6)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 31, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.embedding(ids)).tanh())


class ReadsTable(nn.Module):
    """The same without a module for the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(31, 6)
        self.body = nn.Linear(6, 6)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return F.linear(self.body(self.embedding(ids)).tanh(), self.embedding.weight)


class Bags(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.EmbeddingBag(31, 6, mode="max", padding_idx=3)
        self.linear = nn.Linear(6, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.linear(self.embedding(ids))


def _train(build: type[nn.Module], rules: dict[Any, Any], uses: dict[str, Any]) -> None:
    for staging_bytes, inplace in ((TINY, False), (1 << 16, True)):
        wrapped = check_parity(
            build,
            lambda step, rank: (_ids(3, 4, rows=31, seed=10 * step + rank),),
            policy=ShardingPolicy(rules=rules, replicate_below=0, staging_bytes=staging_bytes),
            inplace=inplace,
            steps=2,
        )
        for name, strategy in uses.items():
            module = wrapped.get_submodule(name)
            assert module._adoption.strategies["weight"] == strategy
            assert isinstance(module, Rotated) == isinstance(strategy, Rotate)


MODELS: list[tuple[type[nn.Module], dict[Any, Any], dict[str, Any]]] = [
    (Chain, {}, {"embedding": Rotate(0), "linear": Rotate(0)}),
    (Chain, {nn.Embedding: Rotate(1)}, {"embedding": Rotate(1)}),
    (Bags, {}, {"embedding": Rotate(0)}),
    (TiedHead, {}, {"embedding": Rotate(0), "head": Rotate(0)}),
    (TiedHead, {"embedding": Rotate(1)}, {"embedding": Rotate(1), "head": Rotate(1)}),
    (TiedHead, {"head": Gather()}, {"embedding": Rotate(0), "head": Gather(0)}),
    (
        TiedHead,
        {"embedding": Rotate(1), "head": Gather()},
        {"embedding": Rotate(1), "head": Gather(1)},
    ),
    (
        TiedHead,
        {"embedding": Gather(), "head": Rotate(1)},
        {"embedding": Gather(1), "head": Rotate(1)},
    ),
    (ReadsTable, {}, {"embedding": Rotate(0)}),
    (ReadsTable, {"embedding": Rotate(1)}, {"embedding": Rotate(1)}),
]


@all_world_sizes
@pytest.mark.parametrize("index", range(len(MODELS)))
def test_training_is_that_of_the_dense_model(world_size: int, index: int) -> None:
    run_ranks(world_size, _train, *MODELS[index])


def _evaluate_then_train(dim: int) -> None:
    dense = _table(31, 6, padding_idx=4).to(device(), torch.float64)
    wrapped = RotatedTensorParallel(nn.Sequential(deepcopy(dense)), policy=_policy(dim))
    optimizers = [sgd(model.parameters()) for model in (dense, wrapped)]
    ids = _ids(3, 4, rows=31, seed=0).to(device())
    for _ in range(2):
        for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
            with mode():
                torch.testing.assert_close(wrapped(ids), dense(ids), **FP64)
        for model, optimizer in zip((dense, wrapped), optimizers, strict=True):
            optimizer.zero_grad()
            mean_square(model(ids)).backward()
            optimizer.step()
    torch.testing.assert_close(full(wrapped[0].weight.detach()), dense.weight.detach(), **FP64)


@all_world_sizes
@dims
def test_training_goes_on_after_evaluation(world_size: int, dim: int) -> None:
    run_ranks(world_size, _evaluate_then_train, dim)


def _poisoned() -> None:
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        assert torch.empty(1).isnan()
        for dim in (0, 1):
            for shape in ((70, 9), (7, 300)):
                layer = nn.Embedding(*shape, padding_idx=1)
                _check(layer, lambda rank: (_ids(2 * rank, rows=7, seed=rank),), dim=dim)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.skipif(DEVICE_TYPE != "cpu", reason="on CUDA the mode needs an environment variable")
@all_world_sizes
def test_memory_is_written_before_it_is_read(world_size: int) -> None:
    run_ranks(world_size, _poisoned)


@by_ring
def _traffic(frozen: bool) -> tuple[list[int], int]:
    """How many transfers each hop has, of forward and backward, and what is kept in between."""
    layer = nn.Embedding.from_pretrained(torch.randn(11, 6), freeze=frozen).to(device())
    wrapped = RotatedTensorParallel(nn.Sequential(layer), policy=_policy())
    ids = _ids(4, 5, rows=11, seed=0).to(device())
    post, hops, saved = PointToPoint.post, [], []

    def counting(self: PointToPoint, transfers: Any, tag: int) -> Any:
        hops.append(len(transfers))
        return post(self, transfers, tag)

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with patch.object(PointToPoint, "post", counting):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = wrapped(ids)
        assert all(tensor.data_ptr() == ids.data_ptr() for tensor in saved)
        assert y.requires_grad == (not frozen)
        if y.requires_grad:
            y.sum().backward()
    return hops, len(saved)


@multi_world_sizes
def test_backward_moves_accumulators_only_and_a_frozen_table_nothing(world_size: int) -> None:
    hops = [1] * (world_size - 1)
    assert run_ranks(world_size, _traffic, frozen=True) == [(hops, 0)] * world_size
    assert run_ranks(world_size, _traffic, frozen=False) == [(hops + hops, 1)] * world_size


# Dtypes.


def _check_low_precision(dtype: torch.dtype, mixed: bool, autocast: bool) -> None:
    """Forward copies, so it is exact. The gradient is the mean over ranks of how often ids occur.

    A rank's counts are exact in any of these dtypes. Each of N additions rounds 1/N, or a sum of
    positive numbers that is no larger than the result: together by N epsilons of it at most.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    low = nn.Embedding(11, 6, padding_idx=3, dtype=torch.float32 if mixed else dtype).to(device())
    precision = MixedPrecisionPolicy(param_dtype=dtype if mixed else None)
    for dim in (0, 1):
        wrapped = RotatedTensorParallel(
            nn.Sequential(deepcopy(low)), policy=_policy(dim), mixed_precision=precision
        )
        batches = [_ids(4, 9, rows=11, seed=r).to(device()) for r in range(world_size)]
        with torch.autocast(DEVICE_TYPE, torch.bfloat16, enabled=autocast):
            y = wrapped(batches[rank])
        assert torch.equal(y, low.weight.to(dtype)[batches[rank]])
        y.sum().backward()
        counts = torch.stack([ids.flatten().bincount(minlength=11) for ids in batches]).sum(0)
        counts[3] = 0
        expected = (counts / world_size)[:, None].expand(11, 6)
        grad = full(wrapped[0].weight.grad)
        assert grad.dtype == low.weight.dtype
        rtol = world_size * torch.finfo(grad.dtype).eps
        torch.testing.assert_close(grad.float(), expected.float(), rtol=rtol, atol=0)


def _check_dtypes() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        _check_low_precision(dtype, mixed=False, autocast=False)
        _check_low_precision(dtype, mixed=True, autocast=False)
    _check_low_precision(torch.float32, mixed=False, autocast=True)


@all_world_sizes
def test_rows_and_counts_are_right_in_any_dtype(world_size: int) -> None:
    run_ranks(world_size, _check_dtypes)


# Errors: on all ranks alike, naming the layer, and leaving everything usable.


def _wrapped() -> tuple[nn.Embedding, RotatedTensorParallel]:
    dense = _table(11, 6).to(device(), torch.float64)
    return dense, RotatedTensorParallel(nn.Sequential(deepcopy(dense)), policy=_policy())


def _still_works(dense: nn.Embedding, wrapped: RotatedTensorParallel) -> None:
    wrapped.zero_grad()
    dense.zero_grad()
    ids = _ids(3, 4, rows=11, seed=0).to(device())
    for model in (dense, wrapped):
        mean_square(model(ids)).backward()
    torch.testing.assert_close(full(wrapped[0].weight.grad), dense.weight.grad, **FP64)


def _wrong_ids() -> None:
    dense, wrapped = _wrapped()
    wrong = [
        (torch.zeros(3), TypeError, r"^0: ids are torch.float32; convert"),
        (torch.zeros(3, dtype=torch.bool), TypeError, r"^0: ids are torch.bool; convert"),
    ]
    if DEVICE_TYPE == "cpu":  # a device asserts later, and is of no use after that
        for ids, bounds in (([3, 11], "3 to 11"), ([-1, 2], "-1 to 2"), ([-20, 99], "-20 to 99")):
            message = rf"^0: ids from {bounds} are out of range for 11 rows; give .* 0 to 10$"
            wrong.append((torch.tensor(ids), IndexError, message))
    else:
        wrong.append((torch.zeros(3, dtype=torch.long), ValueError, r"^0: ids are on cpu but"))
    for ids, error, message in wrong:
        if error is not ValueError:
            ids = ids.to(device())
        with (
            no_communication(),
            pytest.raises(error, match=message),
        ):
            wrapped(ids)
        _still_works(dense, wrapped)


@multi_world_sizes
def test_wrong_ids_are_refused_by_name_before_anything_is_sent(world_size: int) -> None:
    run_ranks(world_size, _wrong_ids)


def _misuse_backward() -> None:
    dense, wrapped = _wrapped()
    ids = _ids(3, 4, rows=11, seed=0).to(device())
    loss = mean_square(wrapped(ids))
    with pytest.raises(RuntimeError, match=r"^0: double backward \(create_graph=True\) is not su"):
        torch.autograd.grad(loss, wrapped[0].weight, create_graph=True)
    _still_works(dense, wrapped)
    loss = mean_square(wrapped(ids))
    with torch.no_grad():
        for weight in (dense.weight, wrapped[0].weight):
            weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"^0 was written"):
        loss.backward()
    _still_works(dense, wrapped)


@multi_world_sizes
def test_double_backward_and_writes_before_backward_are_refused(world_size: int) -> None:
    run_ranks(world_size, _misuse_backward)


def _check_max_norm(build: Any) -> None:
    def wrap(strategy: Any) -> RotatedTensorParallel:
        model = nn.Sequential(build(11, 6, max_norm=0.5).to(device()))
        rules = {} if strategy is None else {"0": strategy}
        return RotatedTensorParallel(model, policy=ShardingPolicy(rules=rules, replicate_below=0))

    ids = _ids(3, 4, rows=11, seed=0).to(device())
    ignored = wrap(Ignore())
    ignored(ids)
    assert ignored[0].weight[ids].norm(dim=-1).max() <= 0.5 + 1e-6  # rounding of the norm in fp32
    for strategy in (None, Gather(), Replicate()):
        if dist.get_world_size() == 1:
            alone = wrap(strategy)
            alone(ids)
            assert full(alone[0].weight)[ids].norm(dim=-1).max() <= 0.5 + 1e-6
        else:
            message = r"^0\.weight: with max_norm=0\.5 .*: Ignore\(\) it in the policy, or renorm"
            with pytest.raises(ValueError, match=message):
                wrap(strategy)


@all_world_sizes
@pytest.mark.parametrize("build", [nn.Embedding, nn.EmbeddingBag])
def test_max_norm_is_refused_but_where_it_is_right(world_size: int, build: Any) -> None:
    run_ranks(world_size, _check_max_norm, build)


def _check_forward_itself(build: Any) -> None:
    """Called as no module but as a method, it begins and ends a forward like any other layer."""
    torch.manual_seed(0)
    dense = nn.Sequential(build(11, 6)).to(device())
    wrapped = RotatedTensorParallel(deepcopy(dense), policy=_policy())
    ids = torch.tensor([[1, 2], [10, 2]], device=device())
    with torch.no_grad():
        torch.testing.assert_close(wrapped[0].forward(ids), dense[0](ids))
    assert not wrapped[0]._adoption.ring.lockstep.has_news, "ranks have not compared"


@multi_world_sizes
@pytest.mark.parametrize("build", [nn.Embedding, nn.EmbeddingBag])
def test_forward_itself_may_be_called(world_size: int, build: Any) -> None:
    run_ranks(world_size, _check_forward_itself, build)


class OwnForward(nn.Embedding):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 2


def test_what_has_a_rotated_form() -> None:
    for layer in (nn.Embedding(3, 4), nn.EmbeddingBag(3, 4), nn.Embedding(3, 4).bfloat16()):
        assert rotation_dim(layer, "weight") == 0
    for layer in (
        OwnForward(3, 4),
        nn.Embedding(3, 4, sparse=True),
        nn.EmbeddingBag(3, 4, sparse=True, mode="sum"),
        nn.Embedding(3, 4, max_norm=1.0),
        nn.EmbeddingBag(3, 4, max_norm=1.0),
        nn.Embedding(3, 0),
    ):
        assert rotation_dim(layer, "weight") is None


def _description() -> str:
    layer = nn.Embedding(11, 6, padding_idx=3, device=device())
    RotatedTensorParallel(layer, policy=_policy())
    return repr(layer)


@all_world_sizes
def test_the_repr_shows_the_sharding(world_size: int) -> None:
    expected = f"Embedding(11, 6, padding_idx=3, weight: Rotate(dim=0), 1/{world_size} per rank)"
    assert run_ranks(world_size, _description) == [expected] * world_size
