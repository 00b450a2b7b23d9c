"""2-D meshes: rings that have the same shards, and average with each other what they own.

The oracle is that of one ring: the unsharded model on the batches of all ranks.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor import Replicate as Whole

if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))

import rtp_wrap
from rtp_wrap import (
    Gather,
    MixedPrecisionPolicy,
    OutOfStepError,
    Replicate,
    Rotate,
    RotatedTensorParallel,
    ShardingPolicy,
)
from rtp_wrap.replicas import Replicas
from rtp_wrap.transport import choice
from tests.parity import (
    FP64,
    check_parity,
    compare_gradients,
    compare_weights,
    full,
    fulls,
    mean_square,
    sgd,
)
from tests.ranks import DEVICE_TYPE, WORLD_SIZES, device, run_ranks
from tests.rotated import COMPILERS_WARNINGS, mesh_of_rings

pytestmark = COMPILERS_WARNINGS

NAMES = ("replicate", "rotate")
#: (ranks, rings): one rank in each ring, one ring alone, and two of two.
SHAPES = [(2, 1), (2, 2), (3, 3), (4, 2)]
shapes = pytest.mark.parametrize(
    ("world_size", "rings"), [shape for shape in SHAPES if shape[0] in WORLD_SIZES]
)
two_of_two = pytest.mark.skipif(4 not in WORLD_SIZES, reason="needs four ranks")
transports = pytest.mark.parametrize("transport", ["peer", "ring"])


class Net(nn.Module):
    """Something of every strategy, uneven sizes, and a head that is tied to the table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.mix = nn.Conv1d(5, 5, 1)
        self.norm = nn.LayerNorm(6)
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 6)
        self.memory = nn.GRU(6, 6, batch_first=True)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.mix(self.table(ids))
        x = x + self.down(torch.tanh(self.up(self.norm(x))))
        return self.head(self.frozen(self.memory(x)[0]))


#: The GRU is gathered by default, and the norm replicated by rule.
POLICY = {"norm": Replicate(), "down.bias": Gather(), "*.bias": Replicate()}


def _ids(step: int, rank: int) -> tuple[torch.Tensor]:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return (torch.randint(11, (2, 5), generator=generator),)


def _policy(transport: str) -> ShardingPolicy:
    # By peers where they can be; the rings of one rank have none.
    return ShardingPolicy(rules=POLICY, replicate_below=0, transport=transport)


def _check_parity(rings: int, transport: str, inplace: bool) -> None:
    mesh = mesh_of_rings(rings)
    policy = _policy(transport)
    wrapped = check_parity(Net, _ids, mesh=mesh, policy=policy, inplace=inplace)
    assert wrapped.plan.world_size == mesh.size(1)
    up, norm = wrapped.up.weight, wrapped.norm.weight
    assert up.placements == (Whole(), Shard(0))
    assert norm.placements == (Whole(), Whole())
    assert up.device_mesh == mesh
    for parameter in wrapped.parameters():
        if parameter.grad is not None:
            assert parameter.grad.placements == parameter.placements
            assert parameter.grad.to_local().shape == parameter.to_local().shape


@shapes
@transports
@pytest.mark.parametrize("inplace", [False, True], ids=["overlap", "in place"])
def test_rings_train_like_the_dense_model(
    world_size: int, rings: int, transport: str, inplace: bool
) -> None:
    run_ranks(world_size, _check_parity, rings, transport, inplace)


def _check_a_users_step(rings: int) -> None:
    """Accumulation over two backwards, clipping, AdamW, and gradients asked for by name."""
    torch.manual_seed(0)
    dense = Net().to(device(), torch.float64)
    wrapped = RotatedTensorParallel(deepcopy(dense), mesh=mesh_of_rings(rings), policy=POLICY)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3) for m in (dense, wrapped)]
    for step in range(2):
        for part in range(2):
            everyones = [_ids(2 * step + part, r)[0].to(device()) for r in range(world_size)]
            for model, ids in ((dense, torch.cat(everyones)), (wrapped, everyones[rank])):
                loss = mean_square(model(ids)) / 2
                gradient = torch.autograd.grad(loss, model.up.weight, retain_graph=True)
                loss.backward()
                if model is dense:
                    expected = gradient[0]
            torch.testing.assert_close(full(gradient[0]), expected, **FP64)
        norms = [
            nn.utils.clip_grad_norm_(model.parameters(), 0.1, foreach=False)
            for model in (dense, wrapped)
        ]
        torch.testing.assert_close(full(norms[1]), norms[0], **FP64)
        compare_gradients(dense, wrapped)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        # Adam divides by the root of a mean square that is tiny in the second step: noise grows.
        compare_weights(dense, wrapped, {"rtol": 1e-7, "atol": 1e-9})


@shapes
def test_accumulation_clipping_and_adamw(world_size: int, rings: int) -> None:
    run_ranks(world_size, _check_a_users_step, rings)


def _mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).to(device())


def _x(step: int, rank: int | None = None) -> torch.Tensor:
    """A rank's batch; by default this one's."""
    rank = dist.get_rank() if rank is None else rank
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(4, 6, generator=generator).to(device())


def _backward_of(ranks: Sequence[int], model: nn.Module, like: torch.dtype) -> None:
    """Of a dense model's mean loss on their batches, rounded to a dtype."""
    dtype = next(model.parameters()).dtype
    for rank in ranks:
        x = _x(0, rank).to(like).to(dtype)
        (mean_square(model(x)) / len(ranks)).backward()


def _of_all_ranks(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _check_against_fsdp2(rings: int) -> None:
    mesh, theirs = mesh_of_rings(rings), _mlp()
    for layer in (theirs[0], theirs[2], theirs):
        fully_shard(layer, mesh=mesh)
    ours = RotatedTensorParallel(_mlp(), mesh=mesh, policy=ShardingPolicy(replicate_below=0))
    optimizers = [sgd(theirs.parameters()), sgd(ours.parameters())]
    for step in range(3):
        for model, optimizer in zip((theirs, ours), optimizers, strict=True):
            optimizer.zero_grad()
            mean_square(model(_x(step))).backward()
            optimizer.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert isinstance(mine, DTensor)
        assert isinstance(other, DTensor)
        assert mine.placements == other.placements
        # fp32: sums of a few numbers in another order.
        torch.testing.assert_close(mine.to_local(), other.to_local(), rtol=1e-5, atol=1e-6)


@shapes
def test_parameters_are_laid_out_as_hybrid_fsdp2s_and_come_out_the_same(
    world_size: int, rings: int
) -> None:
    run_ranks(world_size, _check_against_fsdp2, rings)


def _check_precision(rings: int, reduce: torch.dtype | None) -> None:
    """Gradients of bf16 weights differ from the exact ones by no more than their roundings."""
    dtypes = []
    average = Replicas.average

    def noting(self: Replicas, gradient: torch.Tensor, *arguments: Any) -> Any:
        dtypes.append(gradient.dtype)
        return average(self, gradient, *arguments)

    precision = MixedPrecisionPolicy(reduce_dtype=reduce)
    dense = _mlp().to(torch.bfloat16)
    exact = deepcopy(dense).double()
    policy = ShardingPolicy(replicate_below=0)
    wrapped = RotatedTensorParallel(
        dense, mesh=mesh_of_rings(rings), policy=policy, mixed_precision=precision
    )
    _backward_of(range(dist.get_world_size()), exact, torch.bfloat16)
    with mock.patch.object(Replicas, "average", noting):
        mean_square(wrapped(_x(0).to(torch.bfloat16))).backward()
    assert set(dtypes) == ({reduce or torch.bfloat16} if rings > 1 else set())
    for ours, theirs in zip(wrapped.parameters(), exact.parameters(), strict=True):
        assert ours.grad is not None
        assert ours.grad.dtype == torch.bfloat16
        # Of 8 bits: half a unit for each of a handful of roundings on the way.
        scale = theirs.grad.abs().max()  # type: ignore[union-attr]
        assert (full(ours.grad).double() - theirs.grad).abs().max() < 2**-6 * scale  # type: ignore[operator]


@shapes
@pytest.mark.parametrize("reduce", [None, torch.float32], ids=["bf16", "fp32"])
def test_sums_over_rings_are_in_reduce_dtype(
    world_size: int, rings: int, reduce: torch.dtype | None
) -> None:
    run_ranks(world_size, _check_precision, rings, reduce)


def _check_meta(rings: int) -> None:
    """Every rank draws other values; those of the mesh's first rank count, in all rings."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    torch.manual_seed(dist.get_rank())
    state = torch.get_rng_state()
    wrapped = RotatedTensorParallel(model, mesh=mesh_of_rings(rings))
    torch.set_rng_state(state)
    with torch.device(device()):
        own = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    first, *_ = _of_all_ranks([each.detach().cpu() for each in own.parameters()])
    for whole, expected in zip(fulls(wrapped.parameters()), first, strict=True):
        if DEVICE_TYPE == "cpu":  # elsewhere the device's generator draws
            torch.testing.assert_close(whole, expected, rtol=0, atol=0)
        everyones = _of_all_ranks(whole.detach().cpu())
        assert all(torch.equal(each, everyones[0]) for each in everyones)


@shapes
def test_values_are_those_of_the_meshs_first_rank(world_size: int, rings: int) -> None:
    run_ranks(world_size, _check_meta, rings)


def _check_plan(rings: int) -> None:
    """What is sent between rings is as planned, and a plan for others is refused."""
    mesh, sent = mesh_of_rings(rings), []
    options: dict[str, Any] = {"world_size": mesh.size(1), "policy": _policy("ring")}
    planned = rtp_wrap.plan(Net(), replicas=rings, **options)
    assert rtp_wrap.Plan.from_json(planned.to_json()) == planned
    model = RotatedTensorParallel(Net().to(device()), mesh=mesh, plan=planned)
    assert model.plan == planned
    average = Replicas.average

    def counting(self: Replicas, gradient: torch.Tensor, *arguments: Any) -> Any:
        assert dist.get_process_group_ranks(self._group) == [
            mesh.size(1) * ring + mesh.get_local_rank(1) for ring in range(rings)
        ]
        sent.append(2 * (rings - 1) * gradient.nbytes / rings)
        return average(self, gradient, *arguments)

    with mock.patch.object(Replicas, "average", counting):
        mean_square(model(_ids(0, dist.get_rank())[0].to(device()))).backward()
    alone = rtp_wrap.plan(Net(), **options)
    between = 0
    for one, other in zip(planned.parameters, alone.parameters, strict=True):
        if not isinstance(one.home, Replicate):
            place = mesh.get_local_rank(1)
            between += planned.traffic(one, place).nbytes - alone.traffic(other, place).nbytes
    assert between == pytest.approx(sum(sent), abs=20)  # each is rounded to bytes
    if rings > 1:
        with pytest.raises(ValueError, match=rf"made for one ring of .*there are {rings} rings"):
            RotatedTensorParallel(Net().to(device()), mesh=mesh, plan=alone)


@shapes
def test_a_plan_counts_what_rings_send_each_other(world_size: int, rings: int) -> None:
    run_ranks(world_size, _check_plan, rings)


def _check_statistics(rings: int) -> None:
    """A batch norm begins every forward with the statistics of rank 0, of whatever ring."""
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8)).to(device())
    wrapped = RotatedTensorParallel(model, mesh=mesh_of_rings(rings))
    for step in range(3):
        wrapped(_x(step))
    wrapped.eval()
    wrapped(_x(0))
    everyones = _of_all_ranks(model[1].running_mean.cpu())
    assert all(torch.equal(each, everyones[0]) for each in everyones)


@shapes
def test_running_statistics_are_rank_0s(world_size: int, rings: int) -> None:
    run_ranks(world_size, _check_statistics, rings)


def _train(wrapped: nn.Module, steps: range) -> None:
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-2)
    for step in steps:
        optimizer.zero_grad()
        mean_square(wrapped(_x(step))).backward()
        optimizer.step()


def _check_resharding(path: str) -> None:
    """Saved by two rings of two; loaded by one of four, and the other way round."""
    policy = ShardingPolicy(replicate_below=0)
    meshes = {"2-D": mesh_of_rings(2), "1-D": init_device_mesh(DEVICE_TYPE, (4,))}
    for saved, loaded in (("2-D", "1-D"), ("1-D", "2-D")):
        model = RotatedTensorParallel(_mlp(), mesh=meshes[saved], policy=policy)
        _train(model, range(2))
        where = str(Path(path) / saved)
        dcp.save(model.state_dict(), checkpoint_id=where)
        other = RotatedTensorParallel(_mlp(), mesh=meshes[loaded], policy=policy)
        state = other.state_dict()
        dcp.load(state, checkpoint_id=where)
        other.load_state_dict(state)
        pairs = zip(fulls(model.parameters()), fulls(other.parameters()), strict=True)
        assert all(torch.equal(one, another) for one, another in pairs)
        dense = _mlp()
        dense.load_state_dict({name: full(p.detach()) for name, p in model.named_parameters()})
        model.load_state_dict(dense.state_dict())  # whole tensors are cut for each ring
        _train(model, range(2, 4))


@two_of_two
def test_checkpoints_change_between_one_ring_and_two(tmp_path: Path) -> None:
    run_ranks(4, _check_resharding, str(tmp_path))


def _check_compiled(rings: int) -> None:
    def build() -> nn.Sequential:
        torch.manual_seed(0)
        block = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6))
        return nn.Sequential(block).to(device())

    dense, mine = build(), build()
    mine[0].compile(fullgraph=True, backend="aot_eager")
    policy = {"0.0": Replicate(), "*.bias": Replicate(), "*": Rotate()}
    wrapped = RotatedTensorParallel(mine, mesh=mesh_of_rings(rings), policy=policy)
    _backward_of(range(dist.get_world_size()), dense, torch.float32)
    mean_square(wrapped(_x(0))).backward()
    # fp32, and the compiler's own kernels: some units in the last place.
    compare_gradients(dense, wrapped, {"rtol": 1e-4, "atol": 1e-6})


@shapes
def test_compiled_blocks(world_size: int, rings: int) -> None:
    run_ranks(world_size, _check_compiled, rings)


def _impatient(seconds: float, *, across: bool = False) -> DeviceMesh:
    """Two rings of two, of neighbours or not, whose groups wait no longer than that."""
    ranks = torch.arange(4).view(2, 2)
    if across:
        ranks = ranks.t().contiguous()
    timeout = timedelta(seconds=seconds)
    groups = []
    for sets in (ranks.t(), ranks):
        made = [dist.new_group(each.tolist(), timeout=timeout) for each in sets]
        outside: object = dist.GroupMember.NON_GROUP_MEMBER
        groups.append(next(each for each in made if each is not outside))
    return DeviceMesh.from_group(groups, DEVICE_TYPE, ranks, mesh_dim_names=NAMES)


def _check_out_of_step() -> str:
    """The second ring calls one layer more than the first, and nothing is written."""
    mesh = _impatient(1 if DEVICE_TYPE == "cpu" else 20)
    wrapped = RotatedTensorParallel(_mlp(), mesh=mesh, policy=ShardingPolicy(replicate_below=0))
    optimizer = sgd(wrapped.parameters())
    before = [each.detach().to_local().clone() for each in wrapped.parameters()]
    with torch.no_grad():
        x = wrapped[0](_x(0))

    def step() -> None:
        if mesh.get_local_rank("replicate") == 1:
            wrapped[2](F.tanh(x))
        mean_square(wrapped(_x(0))).backward()
        optimizer.step()

    with pytest.raises(OutOfStepError) as caught:
        step()
    for parameter, was in zip(wrapped.parameters(), before, strict=True):
        assert torch.equal(parameter.detach().to_local(), was)
    return str(caught.value)


@two_of_two
def test_rings_that_do_different_things_hear_of_it() -> None:
    for message in run_ranks(4, _check_out_of_step, timeout=60):
        assert "rank 0" in message
        assert "rank 3: 2.bias gather" in message


def _check_other_backwards(policy: dict[str, Any]) -> str:
    """Each ring goes back through a layer of its own, of another size: no sum of the two."""
    heads = nn.ModuleList([nn.Linear(6, 4, bias=False), nn.Linear(6, 7, bias=False)])
    options: dict[str, Any] = {"policy": ShardingPolicy(rules=policy, replicate_below=0)}
    wrapped = RotatedTensorParallel(heads.to(device()), mesh=_impatient(1), **options)
    outputs = [head(_x(0)).sum() for head in wrapped]
    with pytest.raises(OutOfStepError) as caught:
        outputs[dist.get_rank() // 2].backward()
    return str(caught.value)


@two_of_two
@pytest.mark.skipif(DEVICE_TYPE == "cuda", reason="NCCL ends processes that wait too long")
@pytest.mark.parametrize("policy", [{}, {"*": Gather()}], ids=["rotated", "gathered"])
def test_rings_that_go_back_through_other_layers_hear_of_it(policy: dict[str, Any]) -> None:
    for message in run_ranks(4, _check_other_backwards, policy, timeout=60):
        assert re.search(
            r"average over rings failed on rank .* out of step \(rank 0: 0\b.* rank 3: 1\b", message
        )


def _check_other_meshes() -> None:
    """The second ring wraps by itself, which the first one waits for in vain.

    On a mesh of its own: the ranks have wrapped unlike numbers of models over it then.
    """
    mesh = _impatient(1 if DEVICE_TYPE == "cpu" else 10, across=True)
    if mesh.get_local_rank("replicate") == 1:
        RotatedTensorParallel(_mlp(), mesh=mesh["rotate"])
        return
    with pytest.raises(RuntimeError, match=r"2 x 2 ranks \[\[0, 2\], \[1, 3\]\] waited in vain"):
        RotatedTensorParallel(_mlp(), mesh=mesh)


@two_of_two
def test_a_ring_that_wraps_alone_is_an_error_of_the_others() -> None:
    run_ranks(4, _check_other_meshes, timeout=60)


def _check_slices() -> None:
    """Two models at a time, each on a 2-D slice of a 3-D mesh: groups of their own."""
    whole = init_device_mesh(DEVICE_TYPE, (2, 2, 1), mesh_dim_names=("pipeline", *NAMES))
    with pytest.raises(ValueError, match=r"'pipeline', 'replicate', 'rotate'.*give the slice"):
        RotatedTensorParallel(_mlp(), mesh=whole)
    mesh = whole["replicate", "rotate"]
    stage = whole.get_local_rank("pipeline")
    dense = nn.Sequential(*_mlp(), *[nn.Linear(4, 4, device=device())] * stage).double()
    if dist.get_rank() in (0, 3):  # the others, one of each stage, come first, and must not meet
        time.sleep(0.2)
    wrapped = RotatedTensorParallel(deepcopy(dense), mesh=mesh)
    _backward_of([2 * stage, 2 * stage + 1], dense, torch.float64)
    mean_square(wrapped(_x(0).double())).backward()
    compare_gradients(dense, wrapped)


@two_of_two
def test_slices_of_a_larger_mesh() -> None:
    run_ranks(4, _check_slices)


def _transport() -> str:
    """A rank of the second ring is on another host than the rest of its ring."""
    facts = choice._facts

    def elsewhere(own: torch.device) -> Any:
        host = {"host": "elsewhere"} if dist.get_rank() == 3 else {}
        return replace(facts(own), **host)

    with (
        mock.patch.object(choice, "_facts", elsewhere),
        mock.patch.dict(os.environ, {choice.VARIABLE: "peer"}),
    ):
        policy = ShardingPolicy(replicate_below=0)
        wrapped = RotatedTensorParallel(_mlp(), mesh=mesh_of_rings(2), policy=policy)
    mean_square(wrapped(_x(0))).backward()
    return wrapped.transport


@two_of_two
def test_all_rings_have_one_transport() -> None:
    assert run_ranks(4, _transport) == ["ring"] * 4


def _check_refused() -> None:
    unnamed = init_device_mesh(DEVICE_TYPE, (1, dist.get_world_size()))
    with pytest.raises(ValueError, match=r"\(1, 2\) have no names.*mesh_dim_names"):
        RotatedTensorParallel(_mlp(), mesh=unnamed)
    # Where it is right for one rank, that must not go on alone.
    for ranks, names in (([1, 0], ("rotate",)), ([[1], [0]], NAMES), ([[1, 0]], NAMES)):
        with pytest.raises(ValueError, match=r"ranks \[.*ascend in every dimension"):
            RotatedTensorParallel(_mlp(), mesh=DeviceMesh(DEVICE_TYPE, ranks, mesh_dim_names=names))


@pytest.mark.skipif(2 not in WORLD_SIZES, reason="needs two ranks")
def test_meshes_that_cannot_be_used() -> None:
    run_ranks(2, _check_refused)
