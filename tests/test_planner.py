"""What a plan predicts is what wrapping does, rank by rank."""

from __future__ import annotations

import json
from copy import deepcopy
from typing import Any
from unittest import mock

import pytest

if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))

import torch
import torch.distributed as dist
from torch import nn

import rtp_wrap
from rtp_wrap import (
    Gather,
    Ignore,
    MixedPrecisionPolicy,
    Plan,
    Replicate,
    Rotate,
    RotatedTensorParallel,
    ShardingPolicy,
)
from rtp_wrap.transport import PointToPoint
from tests.parity import full, mean_square
from tests.ranks import all_world_sizes, device, multi_world_sizes, run_ranks
from tests.rotated import by_ring
from tests.test_trace import Gated


class Model(nn.Module):
    """All strategies, uneven everything, a tied weight, and a layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 10)
        self.norm = nn.LayerNorm(10)
        self.twice = nn.Linear(10, 10)
        self.frozen = nn.Linear(10, 7).requires_grad_(False)
        self.gathered = nn.Linear(7, 10, bias=False)
        self.ignored = nn.Linear(10, 10)
        self.head = nn.Linear(10, 13, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.embed(ids))
        x = self.twice(self.twice(x).relu())
        x = self.gathered(self.frozen(x))
        return self.head(self.ignored(x.to(self.ignored.weight.dtype)))


RULES: Any = {
    "gathered": Gather(1),
    "ignored": Ignore(),
    "norm": Replicate(),
    "*.bias": Replicate(),
}
POLICIES = {
    "roomy": ShardingPolicy(rules=RULES, replicate_below=0),
    "tiny staging": ShardingPolicy(rules=RULES, replicate_below=0, staging_bytes=1024),
    "other dim": ShardingPolicy(rules={**RULES, nn.Linear: Rotate(1)}, replicate_below=0),
}
IDS = torch.tensor([[1, 2, 3], [4, 5, 12]])


@by_ring
def _check_predictions(name: str, precision: MixedPrecisionPolicy, inplace: bool) -> None:
    options: dict[str, Any] = {
        "policy": POLICIES[name],
        "mixed_precision": precision,
        "inplace": inplace,
    }
    rank, world_size = dist.get_rank(), dist.get_world_size()
    with torch.device("meta"):
        planned = rtp_wrap.plan(Model(), world_size=world_size, example_inputs=IDS, **options)
    model = RotatedTensorParallel(Model().to(device()), **options)
    sent, hops = [], []
    post = PointToPoint.post

    def counting(self: PointToPoint, moves: Any, tag: int) -> Any:
        moves = list(moves)
        sent.extend(outgoing.nbytes for outgoing, _ in moves)
        hops.extend(1 for outgoing, _ in moves if outgoing.numel())
        return post(self, moves, tag)

    with mock.patch.object(PointToPoint, "post", counting):
        mean_square(model(IDS.to(device()))).backward()
    parameters = [getattr(p, "_local_tensor", p) for p in model.parameters()]
    grads = [getattr(p.grad, "_local_tensor", p.grad) for p in model.parameters()]
    assert planned.parameter_bytes(rank) == sum(p.nbytes for p in parameters)
    assert planned.gradient_bytes(rank) == sum(g.nbytes for g in grads if g is not None)
    assert planned.staging_bytes == model.staging_bytes
    assert planned.world_size == world_size
    rotated = [each for each in planned.parameters if isinstance(each.home, Rotate)]
    traffic = [planned.traffic(each, rank) for each in rotated]
    assert sum(each.hops for each in traffic) == len(hops)
    assert sum(each.nbytes for each in traffic) == sum(sent)
    for each, (fqn, parameter) in zip(planned.parameters, model.named_parameters(), strict=True):
        assert each.fqn == fqn
        local = getattr(parameter, "_local_tensor", parameter)
        assert each.shard_shape(world_size, rank) == tuple(local.shape)
    optimizer = torch.optim.Adam([p for p in model.parameters() if hasattr(p, "_local_tensor")])
    optimizer.step()
    moments = [
        state[key]._local_tensor.nbytes
        for state in optimizer.state.values()
        for key in ("exp_avg", "exp_avg_sq")
    ]
    ignored = [each for each in planned.parameters if isinstance(each.home, Ignore)]
    assert planned.adam_bytes(rank) == sum(moments) + 2 * sum(each.nbytes for each in ignored)


@all_world_sizes
@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize(
    ("precision", "inplace"),
    [
        (MixedPrecisionPolicy(), False),
        (MixedPrecisionPolicy(param_dtype=torch.bfloat16), True),
        (MixedPrecisionPolicy(reduce_dtype=torch.float64), False),
    ],
    ids=["as given", "bf16 in place", "fp64 sums"],
)
def test_predictions_are_exact(
    world_size: int, name: str, precision: MixedPrecisionPolicy, inplace: bool
) -> None:
    run_ranks(world_size, _check_predictions, name, precision, inplace)


def _plan(**options: Any) -> Plan:
    options.setdefault("world_size", 4)
    options.setdefault("policy", POLICIES["roomy"])
    return rtp_wrap.plan(Model(), **options)


def test_a_plan_prints_every_parameter_its_reason_and_the_totals() -> None:
    text = str(_plan(example_inputs=IDS))
    for fqn, _ in Model().named_parameters():
        assert fqn in text
    assert "tied to head.weight" in text
    assert "'gathered'" in text  # the rule that chose it
    for word in ("parameters", "gradients", "Adam's moments", "staging", "activations", "hops"):
        assert word in text
    assert "rank 0 of 4" in text
    layers = nn.Sequential(*[nn.Linear(8, 8) for _ in range(12)])
    text = str(rtp_wrap.plan(layers, world_size=2, policy={"*": Rotate(), "*.bias": Replicate()}))
    assert "*.weight   12" in text  # one line for all of them
    assert len(text.splitlines()) < 20


def test_a_plan_survives_json() -> None:
    for inputs in (None, IDS):
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)
        planned = _plan(mixed_precision=policy, example_inputs=inputs)
        assert Plan.from_json(planned.to_json()) == planned
    data = json.loads(planned.to_json())
    assert data["parameters"][0]["uses"][1]["fqn"] == "head.weight"


def test_example_inputs_come_as_a_tensor_a_tuple_or_a_dictionary() -> None:
    plans = [
        rtp_wrap.plan(Gated(), world_size=2, example_inputs=inputs)
        for inputs in (IDS, (IDS,), {"ids": IDS}, [IDS])
    ]
    assert plans[0].sites is not None
    assert all(each == plans[0] for each in plans)
    (pair, _) = plans[0].pairs
    assert (pair.first, pair.last) == (("gate", "up"), "down")
    assert plans[0].outside == ("scale", "shift", "embed.weight")


def test_wrong_arguments_are_errors() -> None:
    with pytest.raises(ValueError, match=r"world_size=0: give a number of at least 1"):
        _plan(world_size=0)
    with pytest.raises(ValueError, match=r"replicas=0: give a number of at least 1"):
        _plan(replicas=0)
    with pytest.raises(ValueError, match=r"did you mean"):
        _plan(policy={"gatherd": Gather()})
    with pytest.raises(RuntimeError, match=r"a and b must have same reduction dim|shapes"):
        rtp_wrap.plan(nn.Linear(20, 30), world_size=2, example_inputs=torch.zeros(4, 7))
    with pytest.raises(ValueError, match=r"weight: with max_norm=1\.0 each forward"):
        rtp_wrap.plan(nn.Embedding(1000, 100, max_norm=1.0), world_size=2)
    conv = nn.Sequential(nn.Conv3d(2, 2, 5, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"0\.weight .* one kernel of 125 elements, which needs"):
        rtp_wrap.plan(
            conv, world_size=2, policy=ShardingPolicy(replicate_below=0, staging_bytes=2048)
        )


def _check_given() -> None:
    """A plan that was changed by hand is what is executed."""
    world_size = dist.get_world_size()
    planned = rtp_wrap.plan(Model(), world_size=world_size, policy=POLICIES["roomy"])
    text = planned.to_json()
    data = json.loads(text)
    for parameter in data["parameters"]:
        if parameter["uses"][0]["fqn"] == "twice.weight":
            parameter["home"] = parameter["uses"][0]["strategy"] = {"strategy": "Gather", "dim": 1}
            parameter["rule"] = "by hand"
    given = Plan.from_json(json.dumps(data))
    torch.manual_seed(0)
    dense = Model().to(device(), torch.float32)
    model: Any = RotatedTensorParallel(deepcopy(dense), plan=given)
    assert model.plan == given
    assert model.twice._adoption.strategies["weight"] == Gather(1)
    assert model.plan.sites is None
    assert model(IDS.to(device())).shape == (2, 3, 13)
    sites = [site.fqn for site in model.plan.sites]
    assert sites == ["embed", "norm", "twice", "twice", "frozen", "gathered", "head"]
    model(IDS.to(device()))
    assert [site.fqn for site in model.plan.sites] == sites
    assert "share an input" not in str(model.plan)  # which only a trace can tell
    for fqn, parameter in model.named_parameters():
        assert torch.equal(full(parameter.detach()), dense.get_parameter(fqn))


@all_world_sizes
def test_a_given_plan_is_executed_and_completed_by_the_first_forward(world_size: int) -> None:
    run_ranks(world_size, _check_given)


def _check_refused() -> None:
    world_size = dist.get_world_size()
    planned = rtp_wrap.plan(Model(), world_size=world_size, policy=POLICIES["roomy"])

    def refused(match: str, error: type[Exception] = ValueError, **options: Any) -> None:
        model = options.pop("model", None) or Model()
        with pytest.raises(error, match=match):
            RotatedTensorParallel(model.to(device()), **{"plan": planned, **options})
        assert not any(hasattr(p, "_local_tensor") for p in model.parameters())

    refused("give either plan or policy", policy={"*": Gather()})
    refused("give either plan or mixed_precision", mixed_precision=MixedPrecisionPolicy())
    refused("give either plan or inplace", inplace=True)
    other = rtp_wrap.plan(Model(), world_size=world_size + 1)
    refused(
        rf"made for one ring of {world_size + 1} ranks, but there is one ring of {world_size}: ",
        plan=other,
    )
    other = rtp_wrap.plan(Model(), world_size=world_size, replicas=2)
    refused(rf"made for 2 rings of {world_size} ranks, .*replicas=1, ", plan=other)
    larger = Model()
    larger.norm = nn.LayerNorm((3, 10))
    refused(r"norm\.weight of shape \(3, 10\).*the plan has .*\(10,\)", model=larger)
    more = Model()
    more.more = nn.Linear(2, 2)
    refused(r"the plan has no parameter more\.weight", model=more)
    refused(r"the model has no parameter embed\.weight", model=nn.Linear(2, 2))
    refused("plan is a str", TypeError, plan="plan")

    class Doubled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    changed = Model()
    changed.twice = Doubled(10, 10)
    refused(r"the plan rotates twice\.weight, but this Doubled has no rotated form", model=changed)


@multi_world_sizes
def test_a_plan_for_another_model_is_refused(world_size: int) -> None:
    run_ranks(world_size, _check_refused)


MIB = 1 << 20


def _staging(layers: int, width: int, vocab: int, **policy: Any) -> float:
    """MiB of a model's default on eight peers: square layers, and one with a row per token."""
    with torch.device("meta"):
        squares = [nn.Linear(width, width, bias=False) for _ in range(layers)]
        model = nn.Sequential(*squares, nn.Linear(width, vocab, bias=False))
    policy_ = ShardingPolicy(transport="peer", **policy)
    return rtp_wrap.plan(model, world_size=8, policy=policy_).staging_bytes / MIB


def test_the_default_staging_is_for_most_layers() -> None:
    """Seven slots: of 64 MiB, for layers of 4096 × 4096 in fp32, whatever the vocabulary is."""
    assert _staging(9, width=4096, vocab=50_000) == 7 * 64
    assert _staging(8, width=4096, vocab=50_000) == 896, "one in nine is more than one in ten"
    assert _staging(9, width=4096, vocab=1) == 7 * 64
    assert _staging(9, width=16384, vocab=50_000) == 896
    assert _staging(9, width=512, vocab=500_000) == 224, "no pieces below 32 MiB"
    assert _staging(9, width=512, vocab=512) == 7, "but no more than there is use for"
    assert _staging(9, width=4096, vocab=50_000, staging_bytes=2000 * MIB) == 2000


def test_the_default_staging_has_room_for_every_kernel() -> None:
    """Which no cut divides."""
    with torch.device("meta"):
        layers = [nn.Linear(512, 512) for _ in range(20)]
        model = nn.ModuleList([*layers, nn.Conv1d(8, 8, 1 << 20)])
    planned = rtp_wrap.plan(model, world_size=16, policy=ShardingPolicy(transport="peer"))
    assert planned.staging_bytes == 7 * 16 * 4 * MIB
