"""Bisection finds the largest depth, and both memory benchmarks report what happened."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import capacity
import memory_efficiency
from harness.bisection import GUIDED, Bisection
from harness.crew import Crew
from harness.peak import GIB, Peak
from harness.trial import Trial
from tests import scripts

ROOT = Path(__file__).parents[1]
SECONDS = 120

pytestmark = pytest.mark.skipif("RANK" in os.environ, reason="starts ranks of its own")


def search(
    budget: int, most: int, survives: Callable[[int], bool], cost: Callable[[int], int]
) -> tuple[int, list[bool]]:
    """The answer, and of each attempt whether it survived."""
    bisection, attempts = Bisection(budget, most), []
    while (depth := bisection.next()) is not None:
        attempts.append(survives(depth))
        if attempts[-1]:
            bisection.survived(depth, cost(depth))
        else:
            bisection.failed(depth)
    return bisection.lower, attempts


@given(st.integers(1, 2000), st.data())
def test_bisection_is_exact_whatever_the_costs(most: int, data: st.DataObject) -> None:
    largest = data.draw(st.integers(0, most))
    costs = data.draw(st.functions(like=lambda depth: 0, returns=st.integers(-50, 50), pure=True))
    found, attempts = search(
        data.draw(st.integers(1, 100)), most, lambda depth: depth <= largest, costs
    )
    assert found == largest
    assert len(attempts) <= GUIDED + 2 * math.ceil(math.log2(most + 1))


@given(st.integers(1, 1000), st.integers(0, 10**6), st.integers(1, 10**6), st.data())
def test_an_affine_cost_needs_four_attempts_and_one_failure(
    most: int, fixed: int, layer: int, data: st.DataObject
) -> None:
    def cost(depth: int) -> int:
        return fixed + layer * depth

    largest = data.draw(st.integers(0, most))
    budget = max(1, cost(largest) + data.draw(st.integers(0, layer - 1)))
    found, attempts = search(budget, most, lambda depth: cost(depth) <= budget, cost)
    assert found == min(most, max(0, budget - fixed) // layer)
    assert len(attempts) <= 4
    assert attempts.count(False) == (found < most)


@given(st.integers(1, 1000), st.integers(1, 10**6), st.integers(0, 10**6), st.integers(1, 10**4))
def test_a_cost_with_a_kink_needs_few(most: int, floor: int, fixed: int, layer: int) -> None:
    """Logits are the peak of a shallow model, gradients that of a deep one."""

    def cost(depth: int) -> int:
        return max(floor, fixed + layer * depth)

    budget = 2 * 10**6
    found, attempts = search(budget, most, lambda depth: cost(depth) <= budget, cost)
    assert found == min(most, (budget - fixed) // layer)
    assert attempts.count(False) <= 4


def test_bisection_refuses_what_it_did_not_ask_for() -> None:
    bisection = Bisection(100, 10)
    with pytest.raises(ValueError, match="depth 3 is not the one to try, which is 1"):
        bisection.survived(3, 1)
    with pytest.raises(ValueError, match="budget=0, most=10"):
        Bisection(0, 10)


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run a benchmark's ``main`` with made-up peaks instead of trials."""

    def run(script: Any, peak: Callable[[Trial, int], Peak], *arguments: object) -> int:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(script, "measure", lambda crew, trial: peak(trial, _world_size(crew)))
        monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, arguments)])
        return script.main()

    return run


def _world_size(crew: Crew) -> int:
    return crew.world_size


def results(file: Path) -> Any:
    return json.loads(file.read_text())["results"]


def test_capacity_tells_what_survived(
    pretend: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def peak(trial: Trial, ranks: int) -> Peak:
        assert (trial.steps, trial.warmup, trial.from_start) == (3, 0, True)
        assert trial.memory_mib == 4 * 1024
        if trial.strategy == "tp":
            return Peak(failure="error", reason="ValueError: 25 heads")
        need = {"dp": 4, "fsdp": 2, "rtp": 1}[trial.strategy] * GIB * trial.spec().layers // 4
        return Peak(need, need) if need <= 4 * GIB else Peak(failure="out of memory")

    models = ("--models", "lm-tiny", "lm", "--width", "lm-tiny", "--max-layers", "10")
    strategies = ("--strategies", "dp", "fsdp", "tp", "rtp")
    out = ("--memory-gib", "4", "--out", tmp_path)
    assert pretend(capacity, peak, *models, *strategies, *out) == 0
    shown = capsys.readouterr().out
    assert "| lm-tiny | 0.000133B | 2.00 | 1.00 | error | 0.50 |" in shown
    assert "| lm | 0.168B | out of memory | 2.50 | error | 1.25 |" in shown
    assert "| lm-tiny, rtp_wrap | 75.0% | – | 50.0% |" in shown
    assert "| lm, rtp_wrap | – | – | 50.0% |" in shown
    assert "| DDP | 4 | 0.0002B | 4.00 | depth 5: out of memory |" in shown
    assert "| FSDP2 per block | 8 | 0.000334B | 4.00 | depth 9: out of memory |" in shown
    assert "| DTensor TP + SP | – | – | – | depth 1: error |" in shown
    assert "| rtp_wrap | 10 | 0.000401B | 2.50 | – |" in shown
    assert "ValueError: 25 heads" in (tmp_path / "capacity.md").read_text()
    chart = (tmp_path / "sizes.svg").read_text()
    assert chart.count("OOM") == 1
    assert chart.count(">error<") == 2
    assert "4 GiB" in chart


def test_interrupted_capacity_keeps_what_it_has(
    pretend: Callable[..., int], tmp_path: Path
) -> None:
    def peak(trial: Trial, ranks: int) -> Peak:
        if trial.strategy == "rtp":
            raise KeyboardInterrupt
        return Peak(GIB, GIB)

    options = ("--models", "lm-tiny", "--strategies", "dp", "rtp", "--memory-gib", "4")
    assert pretend(capacity, peak, *options, "--out", tmp_path) == 130
    (kept,) = results(tmp_path / "capacity.json")["sizes"]
    assert kept["trial"]["strategy"] == "dp"
    assert kept["peak"]["allocated"] == GIB


def test_memory_efficiency_is_its_formula(
    pretend: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def peak(trial: Trial, ranks: int) -> Peak:
        assert not trial.from_start
        if trial.strategy == "single":
            assert ranks == 1
            fits = trial.batch_size == 2 * 3
            return Peak(8 * GIB, 9 * GIB) if fits else Peak(failure="out of memory")
        assert trial.batch_size == 3
        return Peak(5 * GIB, 6 * GIB, staging=2**27)

    options = ("--models", "lm-tiny", "--strategies", "rtp", "--ranks", "2", "4")
    assert pretend(memory_efficiency, peak, *options, "--batch-size", 3, "--out", tmp_path) == 0
    shown = capsys.readouterr().out
    row = "| lm-tiny | 0.000133B | {} | rtp_wrap | {} | 5.00 | {} | 128.0 |"
    assert row.format(2, "8.00", "80.00% | 1024.0") in shown
    assert row.format(4, "out of memory", "– | –") in shown
    two, four = results(tmp_path / "memory_efficiency.json")
    assert (two["efficiency"], two["beyond"]) == (0.8, GIB)
    assert (four["efficiency"], four["beyond"]) == (None, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--memory-gib", "0"), "argument --memory-gib: 0 is not above 0"),
        (("--ranks", "two"), "argument --ranks: invalid int value: 'two'"),
        (("--part", "largest"), "without GPUs, --part largest needs a limit: give --memory-gib"),
    ],
)
def test_capacity_names_mistakes(
    options: tuple[str, ...],
    message: str,
    pretend: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match="2"):
        pretend(capacity, lambda trial, ranks: Peak(), *options)
    assert message in capsys.readouterr().err


def run(script: str, *arguments: object) -> str:
    done = scripts.run(f"benchmarks/{script}", *arguments)
    assert done.code == 0, done.errors
    return done.output


def test_capacity_runs(tmp_path: Path) -> None:
    tiny = ("--models", "lm-tiny", "--width", "lm-tiny", "--max-layers", "2", "--seq-len", "8")
    options = ("--strategies", "rtp", "--memory-gib", "8", "--out", tmp_path)
    run("capacity.py", *tiny, *options)
    found = results(tmp_path / "capacity.json")
    assert [each["trial"]["strategy"] for each in found["sizes"]] == ["rtp"]
    assert [each["layers"] for each in found["largest"]] == [1, 2]
    assert all(
        each["peak"]["failure"] is None for part in ("sizes", "largest") for each in found[part]
    )


def test_capacity_holds_a_strategy_to_the_limit(tmp_path: Path) -> None:
    """The first weight alone, the embedding's 80 MiB, is more than the limit of 32."""
    options = ("--part", "largest", "--width", "lm", "--memory-gib", 1 / 32, "--seq-len", "8")
    shown = run("capacity.py", *options, "--strategies", "dp", "--out", tmp_path)
    assert "| DDP | – | – | – | depth 1: out of memory |" in shown


def test_memory_efficiency_runs(tmp_path: Path) -> None:
    options = ("--models", "llama-tiny", "--strategies", "rtp", "--ranks", "2", "--seq-len", "8")
    run("memory_efficiency.py", *options, "--out", tmp_path)
    (row,) = results(tmp_path / "memory_efficiency.json")
    assert row["single"]["failure"] is row["peak"]["failure"] is None
    assert row["peak"]["staging"] > 0
