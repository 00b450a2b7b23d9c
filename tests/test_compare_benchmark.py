"""The comparison: a run as a user starts it, and the numbers it makes of what was measured."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections import Counter
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import compare
from harness import chart, flops, models, report, rounds, sent
from harness.comparison import Comparison, Run
from harness.crew import Crew, TrialError
from harness.memory import Memory
from harness.strategies import Setting
from harness.trial import Outcome, Trial, run_trial
from rtp_wrap.transport import wanted
from tests import scripts

ROOT = Path(__file__).parents[1]
SECONDS = 120

pytestmark = pytest.mark.skipif("RANK" in os.environ, reason="starts ranks of its own")


def run(*arguments: str, server: bool = False) -> scripts.Done:
    return scripts.run("benchmarks/compare.py", *arguments, server=server)


def test_a_run_on_cpu(tmp_path: Path) -> None:
    strategies = ["single", "dp", "fsdp", "rtp", "fsdp-hybrid", "rtp-hybrid"]
    options = ("--rounds", "2", "--steps", "2", "--warmup", "1", "--seq-len", "16")
    done = run("--strategies", *strategies, *options, "--out", str(tmp_path))
    assert done.code == 0, done.output + done.errors

    written = json.loads((tmp_path / "report.json").read_text())
    assert "compare.py --strategies single" in written["command"]
    assert written["versions"].endswith(f"torch {torch.__version__}")
    assert written["hardware"].startswith("CPU")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", written["date"])
    runs = written["results"]["runs"]
    assert [each["strategy"] for each in runs] == [*strategies, *reversed(strategies)]
    for each in runs:
        ranks = 1 if each["strategy"] == "single" else 2
        assert each["trial"]["strategy"] == each["strategy"]
        assert [len(seconds) for seconds in each["seconds"]] == [2] * ranks
        assert [len(losses) for losses in each["losses"]] == [3] * ranks
        assert each["failure"] is None
    rows = {row["strategy"]: row for row in written["results"]["rows"]}
    assert list(rows) == strategies
    assert rows["fsdp"]["speed"] == rows["single"]["speed_single"] == 1
    for row in rows.values():
        assert row["agrees"]
        assert 0 < row["fastest"] <= row["seconds"] <= row["slowest"]
        assert row["tokens_per_second"] == pytest.approx(16 / row["seconds"])

    markdown = (tmp_path / "report.md").read_text()
    table = [line for line in markdown.splitlines() if line.startswith("|")]
    assert [line.split()[1] for line in table] == ["strategy", "---", *strategies]
    assert written["command"] in markdown
    assert set(table) <= set(done.output.splitlines())
    for name in ("time.svg", "memory.svg"):
        assert f"]({name})" in markdown
        drawing = (tmp_path / name).read_text()
        assert "</svg>" in drawing
        assert all(f">{strategy}<" in drawing for strategy in strategies)


def test_a_run_without_memory(tmp_path: Path) -> None:
    """Of all runs of benchmarks here the one whose ranks come from a server, as a user's do."""
    options = ("--strategies", "dp", "rtp", "--baseline", "dp", "--ranks", "1", "--rounds", "2")
    # A model of 1.6 GB, in a budget in which Python itself can go on: it may end without memory.
    model = ("--model", "gpt2-medium", "--seq-len", "16", "--memory-gib", "0.4")
    done = run(*options, *model, "--out", str(tmp_path), server=True)
    assert done.code == 0, done.output + done.errors
    assert "| dp | out of memory | – |" in done.output
    assert "| rtp | out of memory | – |" in done.output
    assert len(json.loads((tmp_path / "report.json").read_text())["results"]["runs"]) == 2


def fill_memory() -> None:
    """Take all there is, down to the last few bytes, and keep it."""
    taken: list[Any] = []
    with Memory(torch.device("cpu"), 8):
        while True:
            taken.append([taken, len(taken)])


def test_a_rank_without_memory_can_say_so() -> None:
    with Crew(1, SECONDS) as crew, pytest.raises(TrialError) as failure:
        crew.run(fill_memory)
    assert failure.value.kind == "out of memory", failure.value


@pytest.mark.parametrize(
    "options, text",
    [
        (("--rounds", "0"), "--rounds: 0 is not above 0"),
        (("--baseline", "fsdp-root"), "--baseline fsdp-root is none of --strategies"),
    ],
)
def test_mistakes_are_told(
    options: tuple[str, ...],
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["compare.py", *options])
    with pytest.raises(SystemExit, match="2"):
        compare.main()
    assert text in capsys.readouterr().err


class StubCrew(Crew):
    """Takes 1 s per step and loses 5; "dp" is out of memory, in the second round "tp" fails."""

    def run(self, task: Any, *arguments: Any) -> list[Any]:
        (trial,) = arguments
        self.ran = [*getattr(self, "ran", []), trial.strategy]
        if trial.strategy == "dp":
            raise TrialError("out of memory", "rank 0")
        if trial.strategy == "tp" and self.ran.count("tp") == 2:
            raise TrialError("error", "rank 1: no such thing")
        return [Outcome((1.0,), (5.0,), 2**30, 2**31)] * self.world_size


def options(**changes: Any) -> argparse.Namespace:
    strategies = ("dp", "fsdp", "tp", "rtp")
    defaults = {"ranks": 2, "rounds": 3, "timeout": 1.0, "strategies": strategies}
    return argparse.Namespace(**{**defaults, **changes})


def test_who_fails_is_a_row_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rounds, "Crew", StubCrew)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    comparison = Comparison(trial(), ranks=2, baseline="fsdp")
    assert list(compare._runs(comparison, options())) == comparison.runs
    ran = [each.strategy for each in comparison.runs]
    assert ran == ["dp", "fsdp", "tp", "rtp", "rtp", "tp", "fsdp", "fsdp", "rtp"]
    assert "no such thing" in capsys.readouterr().err
    cells = {row[0]: row[1] for row in comparison.table().rows}
    assert cells == {"dp": "out of memory", "fsdp": "1000.0", "tp": "error", "rtp": "1000.0"}
    assert {row.strategy: row.good for row in comparison.rows()} == {
        "dp": True,
        "fsdp": True,
        "tp": False,
        "rtp": True,
    }


def trial(**changes: Any) -> Trial:
    return Trial("fsdp", "llama-tiny", batch_size=1, seq_len=64, **changes)


def measured(strategy: str, turn: int, step: float, loss: float = 6.0, ranks: int = 2) -> Run:
    """Three steps, the middle one of ``step`` seconds on the slowest rank."""
    seconds = [(step / 2, step / 2, step / 2), (step / 4, step, 3 * step)]
    losses = [(loss - 1, loss - 2), (loss + 1, loss + 2)] if ranks == 2 else [(loss - 1, 0.0)]
    return Run(strategy, turn, tuple(seconds[-ranks:]), tuple(losses), 10 + turn, 20 - turn)


def compared(*runs: Run, **changes: Any) -> Comparison:
    comparison = Comparison(trial(**changes), ranks=2, baseline="fsdp")
    for each in runs:
        comparison.add(each)
    return comparison


def test_a_row_is_of_medians() -> None:
    steps = {"fsdp": [1.0, 2.0, 4.0], "rtp": [2.0, 2.0, 16.0]}
    runs = [measured(name, turn, each[turn]) for turn in range(3) for name, each in steps.items()]
    fsdp, rtp = compared(*runs).rows()
    assert (rtp.seconds, rtp.fastest, rtp.slowest) == (2.0, 2.0, 16.0)
    assert rtp.tokens_per_second == 32.0
    assert rtp.speed == 0.5  # of 1/2, 2/2 and 4/16; medians of all rounds would be 1
    assert fsdp.speed == 1.0
    assert rtp.speed_single is None
    assert (rtp.allocated, rtp.reserved) == (12, 20)
    assert (rtp.first_loss, rtp.last_loss) == (6.0, 6.0)


@pytest.mark.parametrize(
    "precision, off, agrees",
    [
        ("fp32", 1e-5, True),
        ("fp32", 1e-3, False),
        ("bf16", 1e-2, True),
        ("mixed", 3e-2, False),
        ("fp16", 3e-3, False),
        ("bf16", float("nan"), False),
    ],
)
def test_a_loss_that_disagrees_is_marked(precision: str, off: float, agrees: bool) -> None:
    wrong = measured("rtp", 1, 1.0, loss=6.0 * (1 + off))
    fine = [measured(name, turn, 1.0) for turn in range(2) for name in ("dp", "fsdp")]
    comparison = compared(
        measured("rtp", 0, 1.0), wrong, *fine, setting=Setting(precision=precision)
    )
    assert [row.agrees for row in comparison.rows()] == [agrees, True, True]
    assert comparison.rows()[0].good == agrees
    assert ("disagrees" in comparison.table().rows[0][-1]) != agrees


def test_single_has_the_first_loss_of_rank_0() -> None:
    others = [measured("tp", 0, 1.0), measured("dp", 0, 1.0)]  # fsdp, the baseline, has failed
    for loss, agrees in ((6.0, True), (6.01, False)):
        single = measured("single", 0, 1.0, loss=loss, ranks=1)
        row = compared(*others, single).rows()[-1]
        assert row.agrees == agrees
    assert compared(others[0], single).rows()[-1].agrees  # tensor parallel ranks have one loss


def test_flops_and_their_share_of_the_peak() -> None:
    # Per block q and out 64 x 64, k and v 32 x 64, gate, up and down 64 x 128; a head of 512 x 64.
    weights = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128) + 512 * 64
    assert flops.per_token(models.find("llama-tiny"), 16) == 6 * weights + 6 * 2 * 64 * 16
    weights = 2 * (4 * 64 * 64 + 2 * 64 * 128) + 512 * 64
    assert flops.per_token(models.find("lm-tiny"), 16) == 6 * weights + 6 * 2 * 64 * 16
    for precision, peak in (("bf16", 989.5), ("mixed", 989.5), ("fp16", 989.5), ("fp32", 67.0)):
        share = flops.utilisation(peak * 0.25e12, "NVIDIA H200", Setting(precision=precision))
        assert share == pytest.approx(0.25)
    assert flops.utilisation(1e12, "CPU", Setting()) is None


class Wire(TorchDispatchMode):
    """Adds up what this rank's collectives and messages send, with ring algorithms."""

    def __init__(self, ignored: tuple[int, ...]) -> None:
        super().__init__()
        self.ignored = ignored
        ranks = dist.get_world_size()
        self.factors = {  # of the first tensor's bytes
            "c10d::send": 1.0,
            "c10d::allreduce_": 2 * (ranks - 1) / ranks,
            "c10d::allgather_": ranks - 1,
            "c10d::_allgather_base_": (ranks - 1) / ranks,
            "c10d::_reduce_scatter_base_": ranks - 1,
            "_c10d_functional::all_reduce": 2 * (ranks - 1) / ranks,
            "_c10d_functional::all_gather_into_tensor": ranks - 1,
            "_c10d_functional::reduce_scatter_tensor": (ranks - 1) / ranks,
        }
        self.sent = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # first what it makes of it
        factor = self.factors.get(func._schema.name)
        if factor is not None:
            tensor = next(each for each in tree_leaves(args) if isinstance(each, Tensor))
            if tensor.shape != self.ignored:
                self.sent += factor * tensor.nbytes
        return func(*args, **(kwargs or {}))


def sent_by(trial: Trial) -> float:
    """Bytes that this rank really sends from one optimizer step to the next.

    The gradients of tensor parallel norms, which travel in the optimizer, are left out.
    """
    sums = []
    with Wire(ignored=(trial.spec().dim,)) as wire:
        hook = register_optimizer_step_pre_hook(lambda *_: sums.append(wire.sent))
        run_trial(trial)
        hook.remove()
    return sums[-1] - sums[-2]


SIZES = {"llama-tiny": {"dim": 256, "ffn": 512}, "lm-tiny": {"ninp": 256, "nhid": 512, "layers": 1}}
PLAIN, CHECKPOINTED = Setting(), Setting(precision="mixed", checkpointing=True)
CASES = [
    ("dp", "lm-tiny", CHECKPOINTED),
    ("fsdp-root", "llama-tiny", PLAIN),
    ("fsdp", "lm-tiny", CHECKPOINTED),
    ("tp", "llama-tiny", PLAIN),
    ("tp", "llama-tiny", CHECKPOINTED),
    ("tp", "lm-tiny", CHECKPOINTED),
    ("rtp-ring", "llama-tiny", PLAIN),
    ("rtp-ring", "lm-tiny", CHECKPOINTED),
]
if not torch.cuda.is_available() and wanted("auto") == "auto":  # else no message can be seen
    CASES.append(("rtp-inplace", "llama-tiny", CHECKPOINTED))


def test_what_is_sent_is_what_the_formulas_say() -> None:
    with Crew(2, SECONDS) as crew:
        for strategy, model, setting in CASES:
            each = Trial(strategy, model, 1, 8, setting, SIZES[model], steps=2, warmup=0)
            assert crew.run(sent_by, each)[0] == sent.per_step(each, 2), each


@pytest.mark.parametrize("name", ["fsdp", "rtp"])
def test_what_hybrids_send(name: str) -> None:
    """In each of two rings of two what two ranks send, and a rank's half of the gradients."""
    each = Trial(name, "llama-tiny", 1, 8, CHECKPOINTED)
    hybrid = replace(each, strategy=f"{name}-hybrid")
    model = each.spec().build()
    halves = sum(p.numel() for p in model.parameters() if p.dim() > 1 or name == "fsdp") // 2
    norms = sum(p.numel() for p in model.parameters()) - 2 * halves
    between = 4 * (halves + (2 * 3 / 4 - 2 * 1 / 2) * norms)  # all-reduced by four, not by two
    assert sent.per_step(hybrid, 4) == sent.per_step(each, 2) + between


def test_what_is_sent_alone_and_by_an_unknown_strategy() -> None:
    assert sent.per_step(replace(trial(), strategy="single"), 2) == 0
    assert sent.per_step(replace(trial(), strategy="tp"), 1) == 0
    with pytest.raises(ValueError, match="no formula for 'pp'"):
        sent.per_step(replace(trial(), strategy="pp"), 2)


def losses_of(trial: Trial) -> tuple[float, ...]:
    """Compiled without code generation, which takes long and is not what differs."""
    with patch.object(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager")):
        return run_trial(trial).losses


def test_tensor_parallel_blocks_are_compiled() -> None:
    each = Trial("tp", "llama-tiny", 1, 8, changes={"layers": 1}, steps=2, warmup=0)
    with Crew(2, SECONDS) as crew:
        plain = crew.run(losses_of, each)
        compiled = crew.run(losses_of, replace(each, setting=Setting(compile=True)))
    assert compiled[0] == pytest.approx(plain[0])


@pytest.mark.parametrize("warmup", [3, 1])
def test_a_graphed_step_needs_gpus_and_warmup(warmup: int) -> None:
    if torch.cuda.is_available() and warmup > 1:
        pytest.skip("here it has both")
    with pytest.raises(ValueError, match="needs GPUs, and two steps of warmup"):
        run_trial(Trial("rtp-graph", "llama-tiny", 1, 8, warmup=warmup))


def test_tables(capsys: pytest.CaptureFixture[str]) -> None:
    table = report.Table("sizes", ["name", "a|b"])
    table.add("x", None)
    with pytest.raises(ValueError, match="1 cells for the 2"):
        table.add("y")
    markdown = "## sizes\n\n| name | a\\|b |\n| --- | ---: |\n| x | – |\n"
    assert table.markdown() == markdown
    assert table.rich().row_count == 1
    report.show(table)  # not on a terminal
    assert markdown in capsys.readouterr().out


def test_what_is_written_is_whole(tmp_path: Path) -> None:
    report.write(tmp_path / "new", "r", data=[1], markdown="text")
    with pytest.raises(TypeError):
        report.write(tmp_path / "new", "r", data=object(), markdown="other")
    written = json.loads((tmp_path / "new" / "r.json").read_text())
    assert written["results"] == [1]
    assert {"command", "hardware", "versions", "date"} < set(written)
    assert (tmp_path / "new" / "r.md").read_text().endswith("text")
    assert Counter(file.suffix for file in (tmp_path / "new").iterdir()) == {".json": 1, ".md": 1}


def test_a_chart_shows_what_ran_out_of_memory(tmp_path: Path) -> None:
    series = {"allocated": [1.0, None], "reserved": [1.5, 2.0]}
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        chart.bars(
            tmp_path / name / "c.svg", ["dp", "rtp"], series, ylabel="GiB", line=("limit", 2.0)
        )
    drawing = (tmp_path / "a" / "c.svg").read_text()
    for text in ("dp", "rtp", "allocated", "reserved", "limit", "GiB", "1.5", "OOM"):
        assert f">{text}<" in drawing
    assert drawing == (tmp_path / "b" / "c.svg").read_text()
