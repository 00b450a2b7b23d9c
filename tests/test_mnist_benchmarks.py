"""The MNIST scripts do, on two CPU ranks, what one dense model does with the batches of both."""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from harness.digits import in_order, load, read_idx, shuffled
from harness.mnist import ConvNet
from tests import scripts

CPU = torch.device("cpu")
EPOCHS, BATCHES, BATCH_SIZE = 2, 2, 8

pytestmark = pytest.mark.skipif("RANK" in os.environ, reason="starts ranks of its own")


def run(script: str, *options: object, cwd: Path, ranks: int = 2) -> scripts.Done:
    return scripts.run(f"benchmarks/{script}", *options, ranks=ranks, cwd=cwd)


def idx(elements: Tensor) -> bytes:
    """The contents of an IDX file of bytes."""
    header = struct.pack(f">HBB{elements.dim()}I", 0, 8, elements.dim(), *elements.shape)
    return header + bytes(elements.byte().flatten().tolist())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small MNIST of noise, half of it packed; both parts are odd in number."""
    folder = tmp_path_factory.mktemp("mnist")
    generator = torch.Generator().manual_seed(0)
    for prefix, count in (("train", 65), ("t10k", 7)):
        images = torch.randint(256, (count, 28, 28), generator=generator)
        labels = torch.randint(10, (count,), generator=generator)
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(labels))
    return folder


@dataclass(frozen=True)
class Expected:
    """Losses of every batch, (loss, right ones) of every test, and the final weights."""

    losses: list[float]
    tests: list[tuple[float, int]]
    weights: dict[str, Tensor]


@pytest.fixture(scope="module")
def expected(folder: Path) -> Expected:
    """What one dense model does, with both ranks' batches in one."""
    digits = load(folder)
    torch.manual_seed(1)
    model = ConvNet(dropout=0)
    optimizer = torch.optim.Adadelta(model.parameters(), lr=0.5)
    losses, tests = [], []
    for epoch in range(1, EPOCHS + 1):
        batches = [
            shuffled(len(digits.train), BATCH_SIZE, rank=rank, ranks=2, seed=1, epoch=epoch)
            for rank in range(2)
        ]
        for pair in list(zip(*batches, strict=True))[:BATCHES]:
            images, labels = digits.train.batch(torch.cat(pair), CPU)
            loss = F.nll_loss(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        images, labels = digits.test.batch(torch.arange(len(digits.test)), CPU)
        with torch.no_grad():
            output = model(images)
        right = (output.argmax(1) == labels).sum()
        tests.append((F.nll_loss(output, labels).item(), int(right)))
        optimizer.param_groups[0]["lr"] *= 0.7
    return Expected(losses, tests, model.state_dict())


@pytest.mark.parametrize("script", ["dp_mnist.py", "fsdp_mnist.py", "rtp_mnist.py"])
def test_learns_as_a_dense_model_does(
    script: str, folder: Path, expected: Expected, tmp_path: Path
) -> None:
    options = (
        *("--data-dir", str(folder), "--dropout", "0", "--lr", "0.5", "--log-interval", "1"),
        *("--epochs", str(EPOCHS), "--max-batches", str(BATCHES)),
        *("--batch-size", str(BATCH_SIZE)),
        *("--test-batch-size", "1"),  # 7 images, so that one rank's last batch is empty
        *("--json", "measured.json", "--save-model"),
    )
    code, output, errors = run(script, *options, cwd=tmp_path)
    assert code == 0, errors

    # Sums in another order, over a few steps, and six digits printed.
    losses = re.findall(r"^Train Epoch: \d \[\d+/65 \(\d+%\)\]\tLoss: (\S+)$", output, re.M)
    assert [float(loss) for loss in losses] == pytest.approx(expected.losses, abs=1e-5)
    tests = re.findall(r"^Test set: Average loss: (\S+), Accuracy: (\d)/7 \(\d+%\)$", output, re.M)
    assert [int(right) for _, right in tests] == [right for _, right in expected.tests]
    means = [mean for mean, _ in expected.tests]
    assert [float(mean) for mean, _ in tests] == pytest.approx(means, abs=1e-4)
    assert len(re.findall(r"^Peak memory of rank [01]: \d+\.\d MiB ", output, re.M)) == 2
    assert re.search(r"^Elapsed time: \d+\.\d+ s$", output, re.M)

    measured = json.loads((tmp_path / "measured.json").read_text())
    assert [loss for _, _, loss in measured["losses"]] == pytest.approx(expected.losses, abs=1e-5)
    assert [test["loss"] for test in measured["tests"]] == pytest.approx(means, abs=1e-5)
    assert len(measured["peak_bytes"]) == measured["ranks"] == 2
    assert not measured["interrupted"]

    saved = tmp_path / "mnist_cnn.pt"
    assert str(saved) in output
    weights = torch.load(saved)
    assert weights.keys() == expected.weights.keys()
    torch.testing.assert_close(weights, expected.weights, rtol=0, atol=1e-5)


def test_rtp_learns_the_built_in_digits(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    options = ("--epochs", "1", "--batch-size", "16", "--max-batches", "32", "--log-interval", "8")
    code, output, errors = run("rtp_mnist.py", *options, cwd=tmp_path)
    assert code == 0, errors
    accuracies = re.findall(r"Accuracy: (\d+)/297 ", output)
    assert int(accuracies[-1]) / 297 > 0.8


def test_an_interruption_leaves_what_was_measured(folder: Path, tmp_path: Path) -> None:
    options = ("--data-dir", str(folder), "--epochs", "10000", "--json", "measured.json")
    with scripts.Script("benchmarks/rtp_mnist.py", *options, ranks=2, cwd=tmp_path) as running:
        running.wait_for("Train Epoch: 2")
        running.interrupt()
        code, output, errors = running.wait()
    assert code == 128 + signal.SIGINT, errors
    assert "interrupted" in output
    measured = json.loads((tmp_path / "measured.json").read_text())
    assert measured["interrupted"]
    assert len(measured["losses"]) >= 2
    assert measured["tests"]


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("count, size", [(1, 1), (7, 1), (7, 3), (64, 8), (65, 8)])
def test_ranks_have_equally_many_batches(count: int, size: int, ranks: int) -> None:
    tests = [in_order(count, size, rank=rank, ranks=ranks) for rank in range(ranks)]
    assert len({len(batches) for batches in tests}) == 1
    assert max(len(batch) for batches in tests for batch in batches) <= size
    assert sorted(torch.cat([torch.cat(batches) for batches in tests]).tolist()) == list(
        range(count)
    )
    trains = [
        shuffled(count, size, rank=rank, ranks=ranks, seed=0, epoch=1) for rank in range(ranks)
    ]
    assert len({tuple(len(batch) for batch in batches) for batches in trains}) == 1
    seen = torch.cat([torch.cat(batches) for batches in trains])
    assert len(seen) - count < ranks
    assert set(seen.tolist()) == set(range(count))


def test_epochs_are_shuffled_differently() -> None:
    first, second = (
        torch.cat(shuffled(64, 8, rank=0, ranks=2, seed=0, epoch=epoch)) for epoch in (1, 2)
    )
    assert first.tolist() != second.tolist()


@pytest.mark.parametrize("packed", [False, True])
def test_idx_files_are_read(packed: bool, tmp_path: Path) -> None:
    elements = torch.arange(24).view(2, 3, 4) * 10
    data = idx(elements)
    assert data[:8].hex() == "0000080300000002"
    file = tmp_path / "images"
    if packed:
        (tmp_path / "images.gz").write_bytes(gzip.compress(data))
    else:
        file.write_bytes(data)
    read = read_idx(file, dims=3)
    assert read.dtype == torch.uint8
    assert torch.equal(read.long(), elements)


GOOD = idx(torch.zeros(3))


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("labels", b"", "begins with nothing, not with 00000801"),
        ("labels", b"\0\0\x08\x03" + GOOD[4:], "begins with 00000803, not with 00000801"),
        ("labels", GOOD[:6], "ends within its header, after 6 bytes"),
        ("labels", GOOD[:-1], "has 2 bytes after its header, which announces 3"),
        ("labels", GOOD + b"\0", "has 4 bytes after its header, which announces 3"),
        ("labels.gz", GOOD, r"labels\.gz cannot be unpacked"),
        ("labels.gz", gzip.compress(GOOD)[:-9], r"labels\.gz cannot be unpacked"),
    ],
)
def test_idx_files_that_are_damaged(name: str, data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_idx(tmp_path / "labels", dims=1)


def test_mnist_that_is_not_mnist(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has neither train-images-idx3-ubyte nor .*\.gz"):
        load(tmp_path)
    images, labels = (tmp_path / f"train-{n}-ubyte" for n in ("images-idx3", "labels-idx1"))
    labels.write_bytes(idx(torch.zeros(2)))
    for shape, message in (((2, 8, 8), "2 images of 8 x 8"), ((3, 28, 28), "3 images, but")):
        images.write_bytes(idx(torch.zeros(shape)))
        with pytest.raises(ValueError, match=message):
            load(tmp_path)
    images.write_bytes(idx(torch.zeros(2, 28, 28)))
    labels.write_bytes(idx(torch.tensor([1, 10])))
    with pytest.raises(ValueError, match="a label 10, above 9"):
        load(tmp_path)


def test_without_any_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ValueError, match="pip install scikit-learn, or give --data-dir"):
        load(None)


def test_mistakes_are_named_before_ranks_start(tmp_path: Path) -> None:
    code, _, errors = run("dp_mnist.py", "--data-dir", tmp_path, cwd=tmp_path, ranks=0)
    assert code == 2
    assert "has neither train-images-idx3-ubyte" in errors
    assert "Traceback" not in errors
