"""The targets: a run as a user starts it, and what is said of numbers that meet or miss them."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

import targets
from harness import rounds
from harness.comparison import Run
from harness.crew import Crew, TrialError
from harness.trial import Outcome
from tests import scripts

pytestmark = pytest.mark.skipif("RANK" in os.environ, reason="starts ranks of its own")


def test_a_run_on_cpu(tmp_path: Path) -> None:
    options = ("--rows", "short", "eager", "--rounds", "1", "--steps", "1", "--warmup", "1")
    done = scripts.run("benchmarks/targets.py", *options, "--out", str(tmp_path))
    assert done.code == 0, done.output + done.errors
    written = json.loads((tmp_path / "targets.json").read_text())
    assert "targets.py --rows short eager" in written["command"]
    short, eager = written["results"]["rows"]
    runs = short["comparison"]["runs"]
    assert [each["strategy"] for each in runs] == ["single", "fsdp", "rtp"]
    (alone, fsdp, rtp) = (max(s for (s,) in each["seconds"]) for each in runs)
    assert short["ratios"]["speed"] == pytest.approx(fsdp / rtp)
    assert short["ratios"]["single"] == pytest.approx(alone / rtp)
    assert eager["target"] == {"speed": 1.03, "peak": 0.95, "single": None}  # that of two ranks
    assert eager["ratios"]["single"] is None
    table = [line for line in done.output.splitlines() if line.startswith("| ")]
    assert [line.split(",")[0] for line in table[2:]] == ["| 8 layers"] * 2
    assert "(≥ 0.85 " in table[2]
    assert "(≥ 1.03 " in table[3]
    assert set(table) <= set((tmp_path / "targets.md").read_text().splitlines())


def arguments(**changes: Any) -> argparse.Namespace:
    defaults = {"ranks": 4, "rounds": 1, "steps": 1, "warmup": 0, "tiny": True}
    return argparse.Namespace(**{**defaults, **changes})


def run(strategy: str, seconds: float, nbytes: int, turn: int = 0) -> Run:
    return Run(strategy, turn, ((seconds,),) * 4, ((5.0,),) * 4, nbytes, nbytes)


def test_ratios_stand_beside_their_targets() -> None:
    attempt = targets.Attempt("eager", arguments())
    assert attempt.strategies == ("single", "fsdp", "rtp")
    # Of 2/2, 3/2 and 2.2/2 the median is that of the last round, and the peak is the worst one.
    for turn, theirs in enumerate((2.0, 3.0, 2.2)):
        attempt.comparison.add(run("single", 1.9, 100, turn))
        attempt.comparison.add(run("fsdp", theirs, 100, turn))
        attempt.comparison.add(run("rtp", 2.0, 95 - turn, turn))
    assert attempt.ratios() == pytest.approx({"speed": 1.1, "single": 0.95, "peak": 0.95})
    assert attempt.cells()[1:] == [
        *("2000.0", "2200.0"),
        *("1.100 (≥ 1.05 met)", "0.950 (≥ 0.97 missed)", "0.950 (≤ 0.94 missed)"),
        "yes",
    ]


def test_who_is_out_of_memory_has_missed_and_what_is_not_measured_has_not() -> None:
    attempt = targets.Attempt("mixed", arguments())
    assert attempt.strategies == ("fsdp", "rtp")
    attempt.comparison.add(run("fsdp", 2.0, 100))
    assert attempt.cells()[1:4] == [None, "2000.0", "– (≥ 1.05 not measured)"]
    attempt.comparison.add(Run("rtp", 0, failure="out of memory"))
    assert attempt.cells()[1:] == [
        *("out of memory", "2000.0"),
        *("– (≥ 1.05 missed)", None, "– (≤ 0.92 missed)", "yes"),
    ]
    assert attempt.good


class StubCrew(Crew):
    """Takes 1 s per step; the fourth trial is interrupted."""

    ran = 0

    def run(self, task: Any, *arguments: Any) -> list[Any]:
        StubCrew.ran += 1
        if StubCrew.ran == 4:
            raise KeyboardInterrupt
        if StubCrew.ran == 2:
            raise TrialError("error", "rank 1: no such thing")
        return [Outcome((1.0,), (5.0,), 2**30, 2**31)] * self.world_size


def test_an_interrupted_run_keeps_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rounds, "Crew", StubCrew)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options = ["--tiny", "--ranks", "2", "--rows", "deep", "mixed", "8b", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["targets.py", "--rounds", "2", *options])
    assert targets.main() == 130
    rows = json.loads((tmp_path / "targets.json").read_text())["results"]["rows"]
    assert [row["name"] for row in rows] == ["deep"]
    runs = [(run["strategy"], run["failure"]) for run in rows[0]["comparison"]["runs"]]
    assert runs == [("fsdp", None), ("rtp", "error"), ("fsdp", None)]
    assert "no such thing" in capsys.readouterr().err
