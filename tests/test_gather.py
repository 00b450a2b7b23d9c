"""Gathered parameters: exact, averaged, sharded again, and careful."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor, Shard
from torch.utils._python_dispatch import TorchDispatchMode

if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))

import rtp_wrap.gather
from rtp_wrap import Gather, Replicate, RotatedTensorParallel
from tests.parity import check_parity, compare_gradients, compare_weights, full, mean_square, sgd
from tests.ranks import DEVICE_TYPE, all_world_sizes, device, multi_world_sizes, run_ranks
from tests.rotated import events

GATHERED = {"*": Gather()}
REPLICATED = {"*": Replicate()}
both = pytest.mark.parametrize("policy", [GATHERED, REPLICATED], ids=["gathered", "replicated"])


class Mixed(nn.Module):
    """Sizes that do not divide, dimensions smaller than the number of ranks, a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 7, 2)
        self.middle = nn.Linear(7, 2)
        self.bare = nn.Parameter(torch.randn(5, 2, 1))
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.unused = nn.Parameter(torch.ones(3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(self.middle(torch.tanh(self.conv(x)).mT))  # [B, L, 2]
        return (y.unsqueeze(1) @ self.bare).squeeze(-1) * self.scale  # [B, 5, L]


def data(step: int, rank: int) -> tuple[torch.Tensor, ...]:
    return (torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(100 * step + rank)),)


def _pair(policy: Any) -> tuple[nn.Module, RotatedTensorParallel, torch.Tensor, torch.Tensor]:
    """A dense model, a wrapped copy, the whole batch, and this rank's part."""
    torch.manual_seed(0)
    dense = Mixed().to(device(), torch.float64)
    wrapped = RotatedTensorParallel(deepcopy(dense), policy=policy)
    parts = [data(0, rank)[0].to(device(), torch.float64) for rank in range(dist.get_world_size())]
    return dense, wrapped, torch.cat(parts), parts[dist.get_rank()]


def _check_dims() -> None:
    for dim in range(3):
        last = check_parity(Mixed, data, policy={"conv.weight": Gather(dim), "bare": Gather(dim)})
        for name in ("conv.weight", "bare"):
            parameter = last.module.get_parameter(name)
            assert parameter.placements == (Shard(dim),)
            assert parameter.grad.placements == (Shard(dim),)
            local = parameter.grad.to_local()
            assert local.shape == parameter.to_local().shape
            assert local.shape[dim] <= -(-parameter.shape[dim] // dist.get_world_size())


@all_world_sizes
def test_any_dimension_of_any_size_can_be_sharded(world_size: int) -> None:
    run_ranks(world_size, _check_dims)


def _check_partial_gradients(policy: Any) -> None:
    dense, wrapped, everything, mine = _pair(policy)
    names = [name for name, _ in dense.named_parameters() if name != "unused"]
    for chosen in (names, ["conv.bias"], ["bare", "middle.weight"]):
        expected = torch.autograd.grad(
            mean_square(dense(everything)), [dense.get_parameter(name) for name in chosen]
        )
        actual = torch.autograd.grad(
            mean_square(wrapped(mine)), [wrapped.module.get_parameter(name) for name in chosen]
        )
        for ours, theirs in zip(actual, expected, strict=True):
            assert isinstance(ours, DTensor)
            torch.testing.assert_close(full(ours), theirs)
    assert all(parameter.grad is None for parameter in wrapped.parameters())


@both
@all_world_sizes
def test_autograd_grad_gives_gradients_of_all_or_some(world_size: int, policy: Any) -> None:
    run_ranks(world_size, _check_partial_gradients, policy)


def _check_accumulation(policy: Any) -> None:
    dense, wrapped, everything, mine = _pair(policy)
    # Micro-batches, all forwards before all backwards; then one graph backward twice.
    for reduction in (mean_square, lambda y: y.sum() * y.shape[0]):
        dense.zero_grad()
        wrapped.zero_grad()
        for model, x in ((dense, everything), (wrapped, mine)):
            losses = [mean_square(model(x * scale)) for scale in (1.0, -0.5, 2.0)]
            for loss in losses:
                loss.backward()
            loss = mean_square(model(x))
            loss.backward(retain_graph=True)
            loss.backward()
        compare_gradients(dense, wrapped, when=str(reduction))


@both
@all_world_sizes
def test_gradients_accumulate_over_micro_batches_and_retained_graphs(
    world_size: int, policy: Any
) -> None:
    run_ranks(world_size, _check_accumulation, policy)


def _fused(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, fused=True)


#: Writes between a forward and its backward. ``parameter.data`` is beyond detection, as in torch.
WRITES: dict[str, Callable[[RotatedTensorParallel], Any]] = {
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, foreach=False).step(),
    "foreach": lambda model: torch.optim.Adam(model.parameters(), lr=0.1, foreach=True).step(),
    "fused": lambda model: _fused(model.parameters()).step(),
    "load_state_dict": lambda model: model.load_state_dict(
        {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    ),
    "in place": lambda model: [nn.init.zeros_(parameter) for parameter in model.parameters()],
}


def _check_writes(policy: Any) -> None:
    for write in WRITES.values():
        _, wrapped, _, mine = _pair(policy)
        mean_square(wrapped(mine)).backward()
        loss = mean_square(wrapped(mine))
        write(wrapped)
        # Of what is saved as it is (replicated parameters), torch may be the first to tell.
        ours, torchs = (
            r"(bare|conv|middle|scale).* was written .*between",
            r"modified by an in-?place",
        )
        with pytest.raises(RuntimeError, match=f"{ours}|{torchs}"):
            loss.backward()
        mean_square(wrapped(mine)).backward()  # and all is well again


@both
@all_world_sizes
def test_a_write_between_forward_and_backward_raises(world_size: int, policy: Any) -> None:
    run_ranks(world_size, _check_writes, policy)


def _check_writes_to_what_is_not_saved() -> None:
    """An embedding does not need its weight for backward, a frozen layer does, for its input."""
    embedding = nn.Sequential(nn.Embedding(9, 4)).to(device())
    frozen = nn.Sequential(nn.Linear(4, 4)).requires_grad_(False).to(device())
    indices = torch.arange(5, device=device())
    x = torch.randn(5, 4, device=device(), requires_grad=True)
    for model, argument in ((embedding, indices), (frozen, x)):
        wrapped = RotatedTensorParallel(model, policy=GATHERED)
        loss = mean_square(wrapped(argument))
        WRITES["load_state_dict"](wrapped)
        with pytest.raises(RuntimeError, match=r"0\.weight was written .*between"):
            loss.backward()


@multi_world_sizes
def test_a_write_raises_whatever_the_weight_is_needed_for(world_size: int) -> None:
    run_ranks(world_size, _check_writes_to_what_is_not_saved)


def _check_double_backward(policy: Any) -> None:
    _, wrapped, _, mine = _pair(policy)
    x = mine.requires_grad_()
    with pytest.raises(RuntimeError, match=r"(bare|conv|scale).*: double backward"):
        torch.autograd.grad(wrapped(x).sum(), list(wrapped.parameters())[:2], create_graph=True)


@both
@all_world_sizes
def test_double_backward_is_refused(world_size: int, policy: Any) -> None:
    run_ranks(world_size, _check_double_backward, policy)


def _check_low_precision(policy: Any) -> None:
    torch.manual_seed(0)
    exact = nn.Sequential(nn.Conv1d(8, 16, 3), nn.GELU(), nn.Conv1d(16, 8, 3)).to(device())
    low = deepcopy(exact).bfloat16()
    exact = deepcopy(low).double()  # of the same values
    wrapped = RotatedTensorParallel(deepcopy(low), policy=policy)
    generator = torch.Generator().manual_seed(1)
    parts = torch.randn(dist.get_world_size(), 32, 8, 9, generator=generator).bfloat16()
    parts = parts.to(device())
    mean_square(exact(parts.double().flatten(0, 1))).backward()
    mean_square(low(parts.flatten(0, 1)).float()).backward()
    mean_square(wrapped(parts[dist.get_rank()]).float()).backward()
    for name, parameter in wrapped.named_parameters():
        truth = exact.get_parameter(name).grad
        ours = (full(parameter.grad).double() - truth).norm() / truth.norm()
        theirs = (low.get_parameter(name).grad.double() - truth).norm() / truth.norm()
        # Rounded activations cost both the same. Then N gradients and their partial sums are
        # rounded where the dense model rounds once: independently, by 2^-8 of the value at most.
        assert ours <= theirs + dist.get_world_size() ** 0.5 * 2**-8, f"{name}: {ours}, {theirs}"


@both
@all_world_sizes
def test_bfloat16_is_as_exact_as_in_the_dense_model(world_size: int, policy: Any) -> None:
    run_ranks(world_size, _check_low_precision, policy)


def _check_sparse(policy: Any) -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Embedding(11, 5, sparse=True)).to(device(), torch.float64)
    wrapped = RotatedTensorParallel(deepcopy(dense), policy=policy)
    indices = torch.arange(4 * dist.get_world_size(), device=device()).remainder(7)
    mean_square(dense(indices)).backward()
    mean_square(wrapped(indices.chunk(dist.get_world_size())[dist.get_rank()])).backward()
    dense[0].weight.grad = dense[0].weight.grad.to_dense()
    compare_gradients(dense, wrapped)
    sgd(dense.parameters()).step()
    sgd(wrapped.parameters()).step()
    compare_weights(dense, wrapped)


@both
@all_world_sizes
def test_sparse_gradients_become_dense(world_size: int, policy: Any) -> None:
    run_ranks(world_size, _check_sparse, policy)


class Propagates(nn.Module):
    """A sparse matrix is saved for backward, which has neither address nor strides."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        adjacency = torch.eye(len(x), dtype=x.dtype, device=x.device).mul(3).to_sparse()
        return torch.sparse.mm(adjacency, x.flatten(1)[:, :6] @ self.weight)


class Rotates(nn.Module):
    """Complex weights, and conjugated views of them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 3, dtype=torch.complex128))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)[:, :6].to(self.weight.dtype)
        y = x @ self.weight @ self.weight.mH
        return torch.view_as_real(y @ self.weight.conj())


class Views(nn.Module):
    """Saved views of a weight: transposed, sliced, expanded, diagonal."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(F.linear(x, self.weight[:4]) @ self.weight.t()[1:5])
        x = x * self.weight[2].expand_as(x) * self.weight.diagonal()
        return x @ self.weight.view(3, 2, 6).transpose(0, 1).reshape(6, 6)[:, ::2]


def _check_saved() -> None:
    for build in (Propagates, Views):
        check_parity(build, data, policy=GATHERED)
    torch.manual_seed(0)
    dense = Rotates().to(device())
    wrapped = RotatedTensorParallel(deepcopy(dense), policy=GATHERED)
    x = data(0, 0)[0].to(device(), torch.float64)
    mean_square(dense(x)).backward()
    mean_square(wrapped(x)).backward()
    compare_gradients(dense, wrapped)


@all_world_sizes
def test_whatever_view_is_saved_comes_back(world_size: int) -> None:
    run_ranks(world_size, _check_saved)


def _check_gathers() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True, device=device())
    wrapped = RotatedTensorParallel(attention, policy=GATHERED)
    x = torch.randn(2, 3, 8, device=device(), requires_grad=True)
    original = rtp_wrap.gather._whole
    with patch.object(rtp_wrap.gather, "_whole", side_effect=original) as whole:
        output, _ = wrapped(x, x + 1, x + 2)
        assert whole.call_count == 4  # weight and bias, of in_proj and out_proj
        output.sum().backward()
        # Biases are not needed again; q, k and v save three views of in_proj's weight.
        assert whole.call_count == 6


@multi_world_sizes
def test_a_module_gathers_once_forward_and_once_backward(world_size: int) -> None:
    run_ranks(world_size, _check_gathers)


class _Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.weight).tanh()


def _check_one_at_a_time() -> None:
    """A frozen weight's gradient, which would let go of it, does not come."""
    layers = [_Product().to(device()) for _ in range(4)]
    wrapped = RotatedTensorParallel(nn.Sequential(*layers), policy=GATHERED)
    original, alive = rtp_wrap.gather._whole, weakref.WeakSet[torch.Tensor]()
    before: list[int] = []

    def whole(*args: Any) -> torch.Tensor:
        before.append(len(alive))
        alive.add(result := original(*args))
        return result

    x = torch.randn(3, 6, device=device(), requires_grad=True)
    with patch.object(rtp_wrap.gather, "_whole", whole):
        wrapped(x).sum().backward()
    assert before == [0] * 8
    assert not alive


@multi_world_sizes
def test_one_modules_weights_are_whole_at_a_time(world_size: int) -> None:
    run_ranks(world_size, _check_one_at_a_time)


class _Collectives(TorchDispatchMode):
    """The names of the collectives that are started."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not any(issubclass(each, DTensor) for each in types):
            if func.namespace in ("c10d", "_c10d_functional"):
                self.names[func._schema.name] += 1
            return func(*args, **(kwargs or {}))
        return NotImplemented  # first what it makes of it


def _check_collectives() -> None:
    for dim in (0, 1):
        policy = {"weight": Gather(dim), "bias": Gather()}
        wrapped = RotatedTensorParallel(nn.Linear(5, 7), policy=policy)
        with _Collectives() as collectives:
            wrapped(torch.randn(3, 5, requires_grad=True)).sum().backward()
        # The weight, the bias, and the weight again.
        assert collectives.names["c10d::allgather_"] == 3, collectives.names
        assert collectives.names["_c10d_functional::all_gather_into_tensor"] == 0


@pytest.mark.skipif(DEVICE_TYPE != "cpu", reason="of Gloo")
@multi_world_sizes
def test_gloo_does_not_get_the_collective_that_corrupts_its_heap(world_size: int) -> None:
    run_ranks(world_size, _check_collectives)


class Renormalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(11, 4))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, self.weight, max_norm=0.1)


class Experts(nn.Module):
    """Two stacks of matrices, of which a rank uses those that its tokens go to, one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(5, 6, 7) / 2)
        self.down = nn.Parameter(torch.randn(5, 7, 6) / 2)

    def forward(self, x: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
        y = torch.zeros_like(x)
        for expert in which.unique().tolist():
            its = which == expert
            y[its] = torch.tanh(x[its] @ self.up[expert]) @ self.down[expert]
        return y


def _tokens(step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rank 0's go to one expert, rank 1's to two, and so on."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    experts = torch.arange(4).remainder(rank + 1) + step
    return torch.randn(4, 6, generator=generator), experts.remainder(5)


def _check_alone() -> None:
    """What a forward reads is a tensor of its own, whatever it does to it beside its values."""
    arguments = [each.to(device()) for each in _tokens(0, 0)]
    for trained in (True, False):
        experts: Any = Experts().to(device())
        experts.up.requires_grad_(trained)
        experts = RotatedTensorParallel(experts, policy=GATHERED).module
        home, seen = experts._parameters["up"]._local_tensor, []
        experts.register_forward_hook(lambda module, *_, seen=seen: seen.append(module.up))
        for mode in (torch.enable_grad(), torch.no_grad()):
            with mode:
                experts(*arguments)
        assert len(seen) == 2
        for whole in seen:
            assert whole is not home
            assert whole.untyped_storage().data_ptr() == home.untyped_storage().data_ptr()


def test_one_rank_reads_its_home_shard_by_another_tensor() -> None:
    run_ranks(1, _check_alone)


def _check_experts() -> None:
    check_parity(Experts, _tokens, policy=GATHERED)
    wrapped: Any = RotatedTensorParallel(Experts().to(device()), policy=GATHERED)
    x, which = (each.to(device()) for each in _tokens(0, 3))
    y = wrapped(x.requires_grad_(), which)
    with events() as seen:
        y.sum().backward()
    counts = Counter(event.partition(" ")[2] for event in seen)
    # One rank has what it gathers.
    assert counts["gather for backward"] == (2 if dist.get_world_size() > 1 else 0)
    assert counts["reduce-scatter"] == counts.total() - counts["gather for backward"] == 2


@all_world_sizes
def test_ranks_may_use_other_parts_of_a_weight_and_other_numbers_of_them(world_size: int) -> None:
    run_ranks(world_size, _check_experts)


def _check_lost_write() -> None:
    wrapped = RotatedTensorParallel(nn.Sequential(Renormalised().to(device())), policy=GATHERED)
    with pytest.raises(RuntimeError, match=r"0\.weight was written to by its module's forward"):
        wrapped(torch.arange(5, device=device()))


@multi_world_sizes
def test_a_write_that_cannot_reach_the_home_shards_raises(world_size: int) -> None:
    run_ranks(world_size, _check_lost_write)


class Spectral(nn.Module):
    """Reads its weight as complex numbers, as it is or cast, or ``rounds`` what it has cast."""

    def __init__(self, dtype: torch.dtype, rounds: bool = False) -> None:
        super().__init__()
        self.rounds = rounds
        self.weight = nn.Parameter(torch.randn(6, 4, 2).to(dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight.to(torch.float32)
        if self.rounds:
            with torch.no_grad():
                weight.round_()
            return (x.unsqueeze(-1) * weight.flatten(1)).sum(-1)
        return (x.unsqueeze(-1) * torch.view_as_complex(weight)).sum(-1).abs()


def _check_other_dtypes(dtype: torch.dtype, frozen: bool, rounds: bool) -> None:
    """What is saved for the gradient of the layer before."""
    torch.manual_seed(0)
    spectral = Spectral(dtype, rounds).requires_grad_(not frozen)
    dense = nn.Sequential(nn.Linear(3, 6), spectral).to(device())
    wrapped = RotatedTensorParallel(deepcopy(dense), policy=GATHERED)
    x = torch.randn(2 * dist.get_world_size(), 3, device=device())
    own = x.chunk(dist.get_world_size())[dist.get_rank()]
    for model, batch in ((dense, x), (wrapped, own)):
        mean_square(model(batch)).backward()
    expected, gradient = dense[0].weight.grad, full(wrapped[0].weight.grad)
    assert expected is not None
    # fp32, and sums of a dozen products: a wrong weight is off by as much as there is.
    torch.testing.assert_close(
        gradient, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())
    )


@pytest.mark.parametrize(
    ("dtype", "frozen", "rounds"),
    [
        (torch.float32, False, False),
        (torch.float32, True, False),
        (torch.bfloat16, False, False),
        (torch.float64, True, False),
        (torch.float64, False, True),
    ],
)
@multi_world_sizes
def test_a_weight_that_is_saved_in_another_dtype_comes_back(
    world_size: int, dtype: torch.dtype, frozen: bool, rounds: bool
) -> None:
    run_ranks(world_size, _check_other_dtypes, dtype, frozen, rounds)


def _fail(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError("Timed out waiting 20000ms for send")


def _check_names() -> None:
    """What a backend says of a rank that does not come names nothing that a user knows."""
    _, wrapped, _, x = _pair(GATHERED)
    loss = mean_square(wrapped(x))
    with (
        patch.object(rtp_wrap.gather, "_reduce_scattered", _fail),
        pytest.raises(RuntimeError, match=r"reduce-scatter failed on rank \d: Timed out"),
    ):
        loss.backward()
    with (
        patch.object(rtp_wrap.gather, "_all_gathered", _fail),
        patch.object(DTensor, "full_tensor", _fail),
        pytest.raises(RuntimeError, match=r"conv\.\w+ gather failed on rank \d: Timed out"),
    ):
        wrapped(x)


@multi_world_sizes
def test_a_collective_that_fails_names_the_layer(world_size: int) -> None:
    run_ranks(world_size, _check_names)
