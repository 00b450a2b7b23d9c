"""The model of communication has the right limits, and the benchmark runs on CPU ranks."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import rtp_wrap
import scaling
from harness import communication, link
from harness.communication import Compute, Fabric, Link, Network, fit
from harness.models import find
from harness.pulling import Peers, peers
from harness.study import Study
from harness.trial import Trial
from rtp_wrap import Gather, MixedPrecisionPolicy, Plan, ShardingPolicy
from tests import scripts

ROOT = Path(__file__).parents[1]
SECONDS = 60

pytestmark = pytest.mark.skipif("RANK" in os.environ, reason="starts ranks of its own")

RING = ShardingPolicy(transport="ring")
FREE = Fabric(Link(0.0, 0.0), Link(0.0, 0.0), ring_step=0.0, kept=1.0)
SLOW = Fabric(Link(2e-3, 1e-8), Link(1e-3, 1e-8), ring_step=1e-4, kept=0.5)
COMPUTE = Compute(step=1.0, optimizer=0.1, floor=0.0, tokens=64, attention_flops=1e6)


def two_linears(ranks: int) -> Plan:
    """Of 256 KiB each, all rotated."""
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(2)))
    return rtp_wrap.plan(model, world_size=ranks, policy=RING)


@pytest.mark.parametrize("fabric", [FREE, SLOW])
def test_one_rank_takes_its_own_step(fabric: Fabric) -> None:
    plan = rtp_wrap.plan(find("llama-tiny").build(), world_size=1)
    assert communication.ring(plan, COMPUTE, fabric) == pytest.approx(1.0)
    assert communication.fsdp(plan, COMPUTE, fabric) == pytest.approx(1.0)


@pytest.mark.parametrize("ranks", [2, 4, 64])
def test_with_free_links_only_the_optimizer_scales(ranks: int) -> None:
    seconds = communication.ring(two_linears(ranks), COMPUTE, FREE)
    assert seconds == pytest.approx(0.9 + 0.1 / ranks)


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_without_computation_hops_are_all_there_is(ranks: int) -> None:
    idle = Compute(step=1e-12, optimizer=0.0, floor=0.0, tokens=64, attention_flops=0.0)
    plan = two_linears(ranks)
    shard = plan.parameters[0].shard_bytes(ranks)
    one, both = SLOW.hop.seconds(shard), SLOW.hop.seconds(2 * shard)
    # Forward, then the first turn of backward, the last one, and those that bring two tiles.
    hops = (ranks - 1) * one + one + one + (ranks - 2) * both
    assert communication.ring(plan, idle, replace(SLOW, kept=1.0)) == pytest.approx(2 * hops)
    # Products that stand still beside a hop come after it.
    busy = replace(COMPUTE, attention_flops=0.0, optimizer=0.0)
    both_in_turn = communication.ring(plan, busy, replace(SLOW, kept=0.0))
    assert both_in_turn == pytest.approx(1.0 + 2 * hops)


def test_slower_links_and_floors_never_help() -> None:
    plan = rtp_wrap.plan(find("llama-tiny").build(), world_size=4, policy=RING)
    for hop in (Link(2e-3, 1e-8), Link(4e-3, 1e-8), Link(4e-3, 1e-6)):
        times = [
            communication.ring(plan, COMPUTE, replace(SLOW, hop=hop, kept=kept))
            for kept in (1.0, 0.5, 0.0)
        ]
        assert times == sorted(times)
    faster = communication.ring(plan, COMPUTE, SLOW)
    for worse in (
        replace(SLOW, hop=Link(3e-3, 1e-8)),
        replace(SLOW, hop=Link(2e-3, 1e-6)),
        replace(SLOW, collective=Link(2e-3, 1e-8)),
        replace(SLOW, ring_step=1e-3),
    ):
        assert communication.ring(plan, COMPUTE, worse) > faster
    assert communication.ring(plan, replace(COMPUTE, floor=1.0), SLOW) > faster


@pytest.mark.parametrize("name", ["llama-tiny", "lm-tiny"])
@pytest.mark.parametrize("ranks", [1, 2, 4, 16])
@pytest.mark.parametrize("staging", [None, 4096])
def test_it_sends_what_the_plan_says(name: str, ranks: int, staging: int | None) -> None:
    rules = {"head": Gather()} if name == "llama-tiny" else {}
    plan = rtp_wrap.plan(
        find(name, layers=1).build(),
        world_size=ranks,
        policy=replace(RING, rules=rules, replicate_below=1000, staging_bytes=staging),
        mixed_precision=MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32
        ),
    )
    assert communication.traffic(plan) == plan.total_traffic()


def test_fit_recovers_a_link() -> None:
    truth = Link(30e-6, 1 / 150e9)
    samples = [(1 << power, truth.seconds(1 << power)) for power in range(16, 27, 2)]
    found = fit(samples)
    assert found.latency == pytest.approx(truth.latency)
    assert found.per_byte == pytest.approx(truth.per_byte)
    assert found.misfit(samples) < 1e-6
    noisy = [(b, t * (1.1 if i % 2 else 0.9)) for i, (b, t) in enumerate(samples)]
    assert fit(noisy).per_byte == pytest.approx(truth.per_byte, rel=0.15)
    assert fit(noisy).misfit(noisy) > 0.05


def test_fit_has_no_negative_numbers() -> None:
    assert fit([(100, 1.0), (200, 3.0)]).latency == 0.0
    assert fit([(100, 2.0), (200, 1.0)]).per_byte == 0.0
    with pytest.raises(ValueError, match="fewer than two sizes"):
        fit([(100, 1.0), (100, 2.0)])


def test_products_beside_a_hop() -> None:
    assert link.kept(hop=1.0, products=3.0, both=3.0) == 1.0
    assert link.kept(hop=1.0, products=3.0, both=3.25) == 0.75
    assert link.kept(hop=1.0, products=3.0, both=5.0) == 0.0
    # The inverse of what the model does with it.
    assert replace(FREE, kept=0.75).turn(hop=1.0, products=3.0) == 3.25


def test_a_network_slows_down_one_ring_more_than_many() -> None:
    network = Network(gpus_per_node=8, gbps=400.0, latency=14e-6)  # 50 GB/s each
    fabric = Fabric(Link(9e-5, 1 / 150e9), Link(1e-5, 1 / 300e9), ring_step=3e-6, kept=1.0)
    between = fabric.between(network, ports=8)
    assert between.hop == Link(pytest.approx(104e-6), pytest.approx(1 / 50e9))  # type: ignore[arg-type]
    assert between.collective == fabric.collective  # 8 ports are more than 300 GB/s
    assert between.ring_step == 14e-6
    # Data parallel between nodes adds what one port needs for the node's gradients.
    plan, nodes = two_linears(8), 4
    seconds = communication.hybrid(1.0, plan, fabric, network, nodes)
    average = 1e-5 + 2 * 3 * 14e-6 + 2 * 3 / 4 * plan.gradient_bytes() / 50e9
    assert seconds - 1.0 == pytest.approx(average)


def test_pulls_hide_behind_products_and_copies_do_not() -> None:
    plan = two_linears(4)
    copying = Peers(Link(0.0, 0.0), kept=1.0, per_copied_byte=1e-9)
    free = replace(copying, per_copied_byte=0.0)
    least = 0.9 + 0.1 / 4
    assert peers(plan, COMPUTE, FREE, free) == pytest.approx(least)
    weights = 2 * 256 * 1024
    # Published for forward and backward, each read and written; parts read, means written.
    copied = weights / 4 * (2 * 2 + 4 + 1) * 1e-9
    assert peers(plan, COMPUTE, FREE, copying) == pytest.approx(least + copied)
    pulled = 3 * 3 / 4 * weights
    for rate, kept, seconds in (
        (0.5, 1.0, 0.9),  # half of the products' time: hidden
        (0.5, 0.8, 0.9 + 0.2 * 0.45),
        (2.0, 0.8, 2 * 0.9),  # twice that: all there is
    ):
        link = Link(0.0, rate * 0.9 / pulled)
        step = peers(plan, COMPUTE, FREE, Peers(link, kept, 0.0))
        assert step == pytest.approx(seconds + 0.1 / 4)
    assert peers(two_linears(1), COMPUTE, SLOW, copying) == pytest.approx(1.0)


def test_of_a_table_the_rows_of_the_batch_are_pulled() -> None:
    def seconds(rows: int, tokens: int) -> float:
        with torch.device("meta"):
            model = nn.Sequential(nn.Embedding(rows, 256), nn.Linear(256, 256, bias=False))
        plan = rtp_wrap.plan(model, world_size=2, policy=RING)
        idle = Compute(step=1e-12, optimizer=0.0, floor=0.0, tokens=tokens, attention_flops=0.0)
        return peers(plan, idle, FREE, Peers(Link(0.0, 1.0), kept=1.0, per_copied_byte=0.0))

    row, linear = 4 * 256 / 2, 3 * 4 * 256 * 256 / 2
    assert seconds(1000, 64) == pytest.approx(linear + (64 + 1000) * row)
    assert seconds(1000, 4096) == pytest.approx(linear + (1000 + 1000) * row)


def test_it_measures_predicts_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = ("--layers", "1", "--batch-size", "1", "--seq-len", "16", "--ranks", "1", "2")
    counts = ("--rounds", "1", "--steps", "2", "--warmup", "1", "--predict", "1", "16")
    done = scripts.run("benchmarks/scaling.py", *sizes, *counts, "--out", tmp_path)
    assert done.code == 0, done.errors
    assert "| rtp_wrap | 2 |" in done.output
    assert "| pull from peers |" in done.output
    results = json.loads((tmp_path / "scaling.json").read_text())["results"]
    runs = {(each["strategy"], each["ranks"]): each for each in results["runs"]}
    assert list(runs) == [("single", 1), ("rtp", 1), ("rtp", 2), ("rtp-ring", 2)]
    assert all(len(each["seconds"]) == 2 for each in runs.values())
    one, many = results["predicted"]
    study = Study.read(tmp_path / "scaling.json")
    for name in ("rtp", "rtp-ring"):
        assert one[name] == pytest.approx(study.step("rtp", 1))
    assert one["fsdp"] == pytest.approx(study.step("single", 1))
    assert many["nodes"] == 2
    assert many["rtp"] is None, "peers are in one node"
    assert many["rtp-ring"] > one["rtp-ring"]
    assert study.formula("rtp", 8, study.fabric()) is not None
    assert "harness/communication.py" in (tmp_path / "scaling.md").read_text()
    assert "rtp_wrap, measured" in (tmp_path / "scaling.svg").read_text()

    before = (tmp_path / "scaling.json").read_text()
    options = ("--predict-only", str(tmp_path / "scaling.json"), "--out", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["scaling.py", *options, "--predict", "1", "16", "1024"])
    assert scaling.main() == 0
    assert (tmp_path / "scaling.json").read_text() == before
    predicted = json.loads((tmp_path / "prediction.json").read_text())["results"]["predicted"]
    assert predicted[:2] == results["predicted"]
    assert predicted[2]["rtp-ring"] > many["rtp-ring"]
    assert "Measured by another run" in (tmp_path / "prediction.md").read_text()


@pytest.mark.parametrize(
    "options, remedy",
    [
        (("--predict-only", "{file}"), "is no scaling.json of this benchmark"),
        (("--predict-only", "{file}", "--seq-len", "8"), "leave out --seq-len"),
        (("--ranks", "1"), "give --ranks 1 2"),
        (("--network-gbps", "0"), "0 is not above 0"),
    ],
)
def test_mistakes_are_named(
    options: tuple[str, ...],
    remedy: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "other.json"
    file.write_text("{}")
    given = [option.format(file=file) for option in options]
    monkeypatch.setattr(sys, "argv", ["scaling.py", *given])
    with pytest.raises(SystemExit, match="2"):
        scaling.main()
    assert remedy in capsys.readouterr().err


def test_what_failed_is_a_row(tmp_path: Path) -> None:
    trial = Trial("single", "llama-tiny", 1, 16)
    runs = [
        {"strategy": "single", "ranks": 1, "round": 0, "seconds": [0.25, 0.5]},
        {"strategy": "rtp", "ranks": 2, "round": 0, "failure": "out of memory"},
    ]
    (table,) = Study(trial, runs).publish(tmp_path, Network(8, 400.0, 14e-6), [1])
    assert [row[:3] for row in table.rows] == [
        ("one rank", "1", "375.00"),
        ("rtp_wrap", "2", "out of memory"),
    ]
    with pytest.raises(ValueError, match="without both steps on one rank"):
        Study.read(tmp_path / "scaling.json")
