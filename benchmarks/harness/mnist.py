"""The MNIST example of PyTorch (github.com/pytorch/examples, mnist/main.py) on several ranks.

A script gives its way of preparing the model; all else is the same for all of them, initial
weights, batches and dropout masks included, so that so are the losses.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.nn import functional as F

from harness import hardware, report
from harness.digits import Digits, in_order, load, shuffled
from harness.memory import Memory
from harness.options import positive
from launch import launch, leave
from report import tell

SAVED_MODEL = Path("mnist_cnn.pt")
#: The most that one rank may wait for another.
PATIENCE = timedelta(minutes=5)
MIB = 1 << 20


class ConvNet(nn.Module):
    """Images [B, 1, 28, 28] in, log-probabilities [B, 10] out; names are those of the example.

    ``dropout`` replaces both of the example's probabilities.
    """

    def __init__(self, dropout: float | None = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3)
        self.conv2 = nn.Conv2d(32, 64, 3)
        self.dropout1 = nn.Dropout(0.25 if dropout is None else dropout)
        self.fc1 = nn.Linear(9216, 128)
        self.dropout2 = nn.Dropout(0.5 if dropout is None else dropout)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.conv1(images))))  # [B, 64, 24, 24]
        x = self.dropout1(F.max_pool2d(x, 2)).flatten(1)  # [B, 9216]
        x = self.dropout2(F.relu(self.fc1(x)))
        return F.log_softmax(self.fc2(x), dim=1)


#: From the whole model on this rank's device to what is trained.
Prepare = Callable[[ConvNet], nn.Module]


def main(script: str, strategy: str, prepare: Prepare) -> None:
    """Run ``script``, the caller's file, on its own ranks or torchrun's."""
    parser = _parser(strategy)
    options = parser.parse_args()
    if options.json is not None and not options.json.parent.is_dir():
        parser.error(f"--json {options.json}: there is no folder {options.json.parent}")
    try:
        digits = load(options.data_dir)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    launch(script, ranks=2 if options.no_cuda else None)
    # Ctrl-C ends a rank at once, but while it trains: see Training.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    device = torch.device("cpu")
    if torch.cuda.is_available() and not options.no_cuda:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if device.index >= torch.cuda.device_count():
            parser.error(
                f"local rank {device.index} has no GPU, there are {torch.cuda.device_count()}: "
                f"start fewer ranks, or give --no-cuda"
            )
        torch.cuda.set_device(device)
    dist.init_process_group(
        "gloo" if device.type == "cpu" else "nccl",
        timeout=PATIENCE,
        device_id=None if device.type == "cpu" else device,
    )
    interrupted = _run(strategy, prepare, digits, options, device)
    leave()
    sys.exit(128 + signal.SIGINT if interrupted else 0)


def _parser(strategy: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=f"Learn MNIST with {strategy}, on every GPU or two CPU ranks."
    )

    def add(flag: str, text: str, **how: Any) -> None:
        default = "; default: %(default)s" if how.get("default") is not None else ""
        parser.add_argument(flag, help=text + default, **how)

    add("--batch-size", "images per rank and step", type=positive(int), default=64)
    add("--test-batch-size", "images per rank, at most", type=positive(int), default=1000)
    add("--epochs", "how often all images are seen", type=positive(int), default=10)
    add("--lr", "Adadelta's", type=rate, default=1.0)
    add("--gamma", "factor of the rate after an epoch", type=rate, default=0.7)
    add("--dropout", "instead of the model's own 0.25 and 0.5", type=probability)
    add("--no-cuda", "CPU ranks, even if there are GPUs", action="store_true")
    add("--seed", "of weights, order of images and dropout", type=int, default=1)
    add("--log-interval", "batches between two lines", type=positive(int), default=10)
    add("--max-batches", "train on no more of each epoch", type=positive(int), metavar="N")
    add("--data-dir", "MNIST's four files, as they are or .gz", type=Path, metavar="DIR")
    add("--save-model", f"write it whole to {SAVED_MODEL}", action="store_true")
    add("--json", "write what was measured", type=Path, metavar="FILE")
    return parser


def rate(text: str) -> float:
    if not 0 <= float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 on")
    return float(text)


def probability(text: str) -> float:
    if not 0 <= float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 0 and less than 1")
    return float(text)


def _run(
    strategy: str,
    prepare: Prepare,
    digits: Digits,
    options: argparse.Namespace,
    device: torch.device,
) -> bool:
    """Train, test, print and write on this rank; return whether it was interrupted."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    tell(
        f"{strategy} on {ranks} {device.type} ranks: {digits.name}, {len(digits.train)} images, "
        f"{len(digits.test)} to test"
    )
    memory = Memory(device)
    torch.manual_seed(options.seed)
    model = prepare(ConvNet(options.dropout).to(device))
    torch.manual_seed(1000 * (options.seed + 1) + rank)  # masks: each rank its own
    memory.restart()
    started = time.perf_counter()
    training = Training(model, digits, options, device)
    training.run()
    seconds = time.perf_counter() - started
    peaks = [(0, 0)] * ranks
    memory.see(model)
    dist.all_gather_object(peaks, memory.peak())

    if training.interrupted:
        tell("\ninterrupted")
    tell(f"Elapsed time: {seconds:.2f} s")
    for each, (allocated, reserved) in enumerate(peaks):
        of = f"allocated, {reserved / MIB:.1f} MiB reserved"
        if device.type == "cpu":
            of = "more resident than before"
        tell(f"Peak memory of rank {each}: {allocated / MIB:.1f} MiB {of}")
    if options.json is not None and rank == 0:
        written = {
            **hardware.describe(),
            "strategy": strategy,
            "arguments": vars(options),
            "data": digits.name,
            "ranks": ranks,
            "device": device.type,
            "interrupted": training.interrupted,
            "losses": training.losses,
            "tests": training.tests,
            "seconds": seconds,
            "peak_bytes": [{"allocated": a, "reserved": r} for a, r in peaks],
        }
        report.replace(options.json, json.dumps(written, indent=2, default=str) + "\n")
    if options.save_model and not training.interrupted:
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(model, options=whole)
        if rank == 0:
            torch.save(state, SAVED_MODEL)
            tell(f"Saved the whole model as {SAVED_MODEL.resolve()}")
    return training.interrupted


class Training:
    """All epochs of one rank, with a test after each.

    ``losses`` has the printed ones, means over the ranks: (epoch, batch, loss). ``tests`` has those
    of all test images. Ctrl-C on any rank ends all of them after the same batch, the next that is
    printed, or the next test.
    """

    def __init__(
        self, model: nn.Module, digits: Digits, options: argparse.Namespace, device: torch.device
    ) -> None:
        self.losses: list[tuple[int, int, float]] = []
        self.tests: list[dict[str, float]] = []
        self.interrupted = False
        self._caught: list[int] = []
        self._model, self._digits, self._options = model, digits, options
        self._device = device
        self._optimizer = torch.optim.Adadelta(model.parameters(), lr=options.lr)

    def run(self) -> None:
        signal.signal(signal.SIGINT, lambda number, frame: self._caught.append(number))
        schedule = torch.optim.lr_scheduler.StepLR(
            self._optimizer, step_size=1, gamma=self._options.gamma
        )
        for epoch in range(1, self._options.epochs + 1):
            self._train(epoch)
            if not self.interrupted:
                self._test(epoch)
            if self.interrupted:
                break
            schedule.step()
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def _train(self, epoch: int) -> None:
        rank, ranks = dist.get_rank(), dist.get_world_size()
        options, part = self._options, self._digits.train
        batches = shuffled(
            len(part), options.batch_size, rank=rank, ranks=ranks, seed=options.seed, epoch=epoch
        )
        self._model.train()
        for number, indices in enumerate(batches[: options.max_batches]):
            images, labels = part.batch(indices, self._device)
            self._optimizer.zero_grad()
            loss = F.nll_loss(self._model(images), labels)
            loss.backward()
            self._optimizer.step()
            if number % options.log_interval:
                continue
            mean = self._sum(loss)[0] / ranks
            self.losses.append((epoch, number, mean))
            tell(
                f"Train Epoch: {epoch} [{number * options.batch_size * ranks}/{len(part)} "
                f"({100 * number / len(batches):.0f}%)]\tLoss: {mean:.6f}"
            )
            if self.interrupted:
                return

    @torch.no_grad()
    def _test(self, epoch: int) -> None:
        part = self._digits.test
        self._model.eval()
        loss = torch.zeros((), dtype=torch.float64, device=self._device)
        hits = torch.zeros_like(loss)
        size = self._options.test_batch_size
        for indices in in_order(len(part), size, rank=dist.get_rank(), ranks=dist.get_world_size()):
            images, labels = part.batch(indices, self._device)
            output = self._model(images)
            loss += F.nll_loss(output, labels, reduction="sum")
            hits += (output.argmax(1) == labels).sum()
        losses, right = self._sum(loss, hits)
        mean, accuracy = losses / len(part), right / len(part)
        self.tests.append({"epoch": epoch, "loss": mean, "accuracy": accuracy})
        tell(
            f"\nTest set: Average loss: {mean:.4f}, "
            f"Accuracy: {right:.0f}/{len(part)} ({accuracy:.0%})\n"
        )

    def _sum(self, *values: Tensor) -> list[float]:
        """Of numbers, over the ranks; all learn whether one was interrupted, too."""
        mine = [*(value.item() for value in values), len(self._caught)]
        total = torch.tensor(mine, dtype=torch.float64, device=self._device)
        dist.all_reduce(total)
        *sums, interrupted = total.tolist()
        self.interrupted = interrupted > 0
        return sums
