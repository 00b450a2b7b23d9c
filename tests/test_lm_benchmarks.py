"""The five language-model benchmarks run on two CPU ranks, and train the same model."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest
import torch

from harness import corpus, flags
from harness.language_model import clip
from harness.models import materialise
from tests import scripts

TINY = (
    *("--ninp", "32", "--nhid", "64", "--nhead", "4", "--num_decoder_layers", "2"),
    *("--vocab_size", "64", "--seq_len", "16", "--use_synthetic_data", "--lr", "0.01"),
)
SCRIPTS = (
    "dp_benchmark.py",
    "fsdp_benchmark.py",
    "tp_benchmark.py",
    "rtp_benchmark.py",
    "rtp_benchmark_inplace.py",
)

pytestmark = pytest.mark.skipif("RANK" in os.environ, reason="starts ranks of its own")


def run(script: str, *options: object, ranks: int = 2) -> str:
    """What the benchmark printed."""
    done = scripts.run(f"benchmarks/{script}", *options, ranks=ranks)
    assert done.code == 0, done.errors
    return done.output


def losses(output: str) -> list[float]:
    return [float(number) for number in re.findall(r"\| batch .* loss +(\S+) ", output)]


@pytest.fixture(scope="module")
def one_rank() -> list[float]:
    """Of one rank that has the batches of both."""
    return losses(run("dp_benchmark.py", *TINY, "--batch_size", "2", ranks=1))


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_strategy_trains_as_one_rank_does(script: str, one_rank: list[float]) -> None:
    output = run(script, *TINY)
    # Adam makes steps of equal size out of gradients that differ by rounding: 1e-4, not 1e-6.
    assert losses(output) == pytest.approx(one_rank, rel=1e-4)
    assert len(one_rank) == 4  # --max_batch
    assert abs(one_rank[-1] - one_rank[0]) > 0.01
    assert re.search(r"^Running .* args: Namespace\(max_batch=4, ", output)
    assert re.search(r"^Throughput\(wps\) is \d+\.\d+\.$", output, re.MULTILINE)
    assert re.search(r"^Elapsed time\(s\) is \d+\.\d+\.$", output, re.MULTILINE)
    peaks = re.findall(r"^Peak additional resident bytes on cpu:(\d): \d+ ", output, re.MULTILINE)
    assert peaks == ["0", "1"]


def test_fairscales_layers_train_alike(one_rank: list[float]) -> None:
    pytest.importorskip("fairscale")
    assert losses(run("tp_benchmark.py", *TINY, "--fairscale")) == pytest.approx(one_rank, rel=1e-4)


def test_evaluation_changes_nothing() -> None:
    options = ("--benchmark_eval", "--epochs", "2", "--max_batch", "2", "--no-enable_auto_wrap")
    seen = losses(run("fsdp_benchmark.py", *TINY, *options, "--precision", "mixed", "--debug"))
    assert len(seen) == 4
    assert seen[:2] == seen[2:]


def test_a_text_is_learned_in_fp16(tmp_path: Path) -> None:
    text, result = tmp_path / "text", tmp_path / "new" / "result.json"
    text.write_text("pass the tile on and add what is yours\n" * 200)
    options = ("--data", text, "--json", result, "--full_fp16", "--checkpoint")
    model = ("--model_name", "llama-tiny", "--seq_len", "16", "--lr", "0.01", "--max_batch", "8")
    seen = losses(run("rtp_benchmark.py", *options, *model, "--debug"))
    assert seen[-1] < 0.5 * seen[0]
    written = json.loads(result.read_text())
    assert [round(batch["loss"], 5) for batch in written["batches"]] == seen
    timed = written["batches"][1:]
    assert written["words_per_second"] == pytest.approx(
        16 * len(timed) / sum(max(batch["seconds"]) for batch in timed)
    )
    assert written["arguments"]["vocab_size"] == 512  # the model's
    assert len(written["peak_bytes"]) == 2


def test_ctrl_c_leaves_what_was_measured(tmp_path: Path) -> None:
    """Of the script alone, which starts its own ranks."""
    result = tmp_path / "result.json"
    options = (*TINY, "--max_batch", "1000000", "--json", result)
    with scripts.Script("benchmarks/rtp_benchmark.py", *options) as running:
        running.wait_for("| batch     3")
        running.interrupt()
        code, output, errors = running.wait()
    assert code == 128 + signal.SIGINT, errors
    assert "Throughput(wps) is" in output
    assert len(json.loads(result.read_text())["batches"]) >= 3


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch):
    def parsed(name: str, *options: str) -> flags.Job:
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setattr(sys, "argv", ["benchmark.py", "--use_synthetic_data", *options])
        return flags.parse(name, epilog="")

    return parsed


def test_defaults_are_the_originals(parse) -> None:
    original = {
        **{"max_batch": 4, "dry_run": False, "debug": False, "benchmark_eval": False},
        **{"model_name": "lm", "vocab_size": 10240, "ninp": 2048, "nhid": 2048, "nhead": 32},
        **{"dropout": 0, "initrange": 0.1, "clip_value": 0.05, "num_decoder_layers": 5},
        **{"seq_len": 128, "epochs": 1, "lr": 0.001, "batch_size": 1, "precision": "fp32"},
    }
    chosen = vars(parse("rtp").options)
    assert {name: chosen[name] for name in original} == original


def test_a_config_sets_sizes_and_flags_change_them(parse) -> None:
    job = parse("dp", "--model_config", "gpt2-large", "--num_decoder_layers", "3")
    assert (job.options.ninp, job.options.nhid, job.options.vocab_size) == (1280, 5120, 50256)
    assert job.spec.layers == 3
    job = parse("dp", "--model_name", "llama-8b", "--vocab_size", "1000")
    assert (job.options.ninp, job.spec.vocab, job.options.dropout) == (4096, 1000, None)


def test_initrange_bounds_embedding_and_head(parse) -> None:
    sizes = ("--ninp", "32", "--nhead", "4", "--nhid", "8", "--num_decoder_layers", "1")
    model = parse("dp", *sizes, "--vocab_size", "64", "--initrange", "0.5").spec.build()
    materialise(model, "", torch.device("cpu"))
    for module in (model.embedding, model.head):
        assert 0.4 < module.weight.abs().max() <= 0.5
    assert model.blocks[0].mlp[0].weight.abs().max() < 0.2


def test_gradients_are_clipped_by_value() -> None:
    model = torch.nn.Linear(2, 1)
    model(torch.tensor([[3.0, -0.01]])).sum().backward()
    clip(model, 0.05)
    assert model.weight.grad.tolist() == [pytest.approx([0.05, -0.01])]


@pytest.mark.parametrize(
    "name, options, complaint",
    [
        ("dp", ("--max_batch", "0"), "0 is not above 0"),
        ("dp", ("--lr", "-1"), "-1 is not above 0"),
        ("dp", ("--dropout", "2"), "--dropout 2.0 is no probability"),
        ("dp", ("--enable_auto_wrap",), "only fsdp_benchmark.py"),
        ("dp", ("--ninp", "100"), "--nhead 32 does not cut --ninp 100"),
        ("dp", ("--data", "some"), "no use for --data some"),
        ("dp", ("--model_name", "llama-1b", "--dropout", "0.1"), "nothing to llama-1b"),
        ("dp", ("--model_name", "llama-1b", "--model_config", "7b"), "leave out --model_config 7b"),
        ("tp", ("--seq_len", "127"), "--seq_len: 127 is no multiple of 2"),
        ("tp", ("--ninp", "60", "--nhead", "5"), "--nhead: 5 is no multiple of 2"),
        ("rtp", ("--precision", "bf16", "--full_fp16"), "not allowed with"),
    ],
)
def test_mistakes_are_named(parse, capsys, name, options, complaint) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse(name, *options)
    assert complaint in capsys.readouterr().err


def test_ranks_see_different_tokens_of_one_batch(parse) -> None:
    job = parse("dp", *TINY, "--batch_size", "3")
    batches, again = list(job.epoch()), list(job.epoch())
    assert [batch.shape for batch in batches] == [(6, 17)] * 4
    assert len({tuple(row.tolist()) for batch in batches for row in batch}) == 24
    assert all(torch.equal(*pair) for pair in zip(batches, again, strict=True))


def test_vocabulary_is_the_most_frequent_words() -> None:
    text = corpus.Corpus(list("abacabd"), vocab_size=3)
    assert text.numbers == {"a": 1, "b": 2}
    assert text.tokens.tolist() == [1, 2, 1, 0, 1, 2, 0]
    with pytest.raises(ValueError, match="vocabulary of 1 "):
        corpus.Corpus(["a"], vocab_size=1)


def test_batches_are_the_text_in_order() -> None:
    text = corpus.Corpus([str(number) for number in range(14)], vocab_size=20)
    first, second = text.batches(size=2, seq_len=3)
    assert first.tolist() == [[1, 2, 3, 4], [4, 5, 6, 7]]
    assert second.tolist() == [[7, 8, 9, 10], [10, 11, 12, 13]]


def test_a_short_text_is_named_with_the_remedy() -> None:
    text = corpus.Corpus(["word"] * 12, vocab_size=2)
    assert len(list(text.batches(size=1, seq_len=11))) == 1
    with pytest.raises(ValueError, match=r"12 words .* 2 sequences of 6, takes 13: .* --data"):
        text.batches(size=2, seq_len=6)


def test_words_of_a_file_and_of_the_standard_library(tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_text(" = Title = \n\n a word , <unk> .\n")
    assert corpus.read_words(file) == ["=", "Title", "=", "a", "word", ",", "<unk>", "."]
    words = corpus.read_words(None)
    assert len(words) > 500_000
    assert {"def", "return", "("} <= set(words)
    assert words == corpus.read_words(None)
