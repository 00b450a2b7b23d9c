"""What the lines of a language-model benchmark say.

A word is a token. A batch takes the seconds of the slowest rank from its tokens on the device to
the end of the optimizer's step, the device synchronised before and after. Words per second (wps)
are those of one rank's batch; the throughput leaves out the first batch. The loss is the mean of
all ranks. Memory and elapsed time are from before the model exists to the last step; memory is
the allocator's peak on CUDA, by how much the resident memory grew elsewhere.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from harness import flags, hardware, report
from harness.memory import Memory
from harness.strategies import apply
from launch import launch, leave
from report import tell

#: A rank that waits longer for others gives up.
TIMEOUT = timedelta(minutes=10)
#: Adam's usual 1e-8 is no protection where second moments round to zero.
ADAM_EPS = {"fp16": 1e-4}
#: What ``Memory`` measures.
PEAK = {"cuda": "allocated", "cpu": "additional resident"}
RULE = "-" * 100


@dataclass(frozen=True)
class Batch:
    """One batch: what every rank saw of it."""

    epoch: int
    number: int
    losses: tuple[float, ...]
    seconds: tuple[float, ...]

    @property
    def loss(self) -> float:
        return sum(self.losses) / len(self.losses)

    def line(self, words: int) -> str:
        """The original's, for so many words per rank."""
        perplexity = torch.tensor(self.loss).exp().item()  # infinite rather than an error
        return (
            f"| batch {self.number:5d} | wps {words / max(self.seconds):9.2f} "
            f"| loss {self.loss:8.5f} | ppl {perplexity:10.2f}"
        )


def main(name: str, script: str) -> None:
    """Run ``script``, the benchmark of the strategy ``name``, on ranks of its own; then exit."""
    job = flags.parse(name, epilog=__doc__ or "")
    launch(script, job.ranks)
    sys.exit(run(job))


def run(job: flags.Job) -> int:
    """Do the job on this rank; all ranks call it. Returns the exit status."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group(device_id=device if device.type == "cuda" else None, timeout=TIMEOUT)
    tell(f"Running {job.strategy.label} with args: {job.options}")
    tell(f"| {job.spec.parameters():,} parameters | {job.ranks} ranks on {hardware.devices()}")
    memory = Memory(device)
    done: list[Batch] = []
    started = time.perf_counter()
    status = 0
    try:
        for batch in batches(job, device, memory):
            if batch.number == 1:
                tell(f"{RULE}\n| start of epoch {batch.epoch}\n{RULE}")
            tell(batch.line(job.words))
            if job.options.debug:
                tell(f"  losses {batch.losses}\n  seconds {batch.seconds}")
            done.append(batch)
    except KeyboardInterrupt:
        tell("interrupted: what follows is of the batches so far")
        status = 128 + signal.SIGINT
    elapsed = time.perf_counter() - started
    (peaks,) = gather(device, memory.peak()[0])
    summarise(job, done, elapsed, [int(peak) for peak in peaks], device)
    leave()
    return status


def batches(job: flags.Job, device: torch.device, memory: Memory) -> Iterator[Batch]:
    """Train on batch after batch, or only evaluate.

    Raises ``KeyboardInterrupt`` on all ranks after the same batch if any of them got a Ctrl-C.
    """
    stops: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: stops.append(number))
    options, strategy = job.options, job.strategy
    model = apply(strategy, job.spec.build(), job.setting, device)
    memory.see(model)
    eps = ADAM_EPS.get(job.setting.precision, 1e-8)
    optimizer = torch.optim.Adam(model.parameters(), lr=options.lr, eps=eps, fused=True)
    training = not options.benchmark_eval
    model.train(training)
    torch.manual_seed(dist.get_rank())  # for dropout
    first = dist.get_rank() * options.batch_size
    rows = slice(None) if strategy.shares_batch else slice(first, first + options.batch_size)
    for epoch in range(1, options.epochs + 1):
        for number, everybodys in enumerate(job.epoch(), 1):
            tokens = everybodys[rows].to(device)
            began = now(device)
            with torch.set_grad_enabled(training):
                with strategy.forward(job.setting, device):
                    logits = model(tokens[:, :-1])
                with strategy.loss():
                    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
                    if training:
                        loss.backward()
            if training:
                clip(model, options.clip_value)
                optimizer.step()
                optimizer.zero_grad()
            seconds = now(device) - began
            whole = loss.full_tensor() if isinstance(loss, DTensor) else loss
            losses, times, stopped = gather(device, whole.item(), seconds, len(stops))
            del logits, loss, whole  # of no use in the next step, which may be the peak
            yield Batch(epoch, number, losses, times)
            if any(stopped):
                raise KeyboardInterrupt


def clip(model: nn.Module, value: float) -> None:
    """Each gradient's elements to ``value`` at most, positive or negative."""
    for parameter in model.parameters():
        grad = parameter.grad
        if isinstance(grad, DTensor) and isinstance(parameter, DTensor):
            # Tensor parallelism leaves those of norms as sums that the ranks still have to make.
            parameter.grad = grad.redistribute(placements=parameter.placements)
    nn.utils.clip_grad_value_(model.parameters(), value)


def now(device: torch.device) -> float:
    """Seconds on a clock, read when the device has done all that it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def gather(device: torch.device, *numbers: float) -> list[tuple[float, ...]]:
    """For each of the numbers, those of all ranks."""
    mine = torch.tensor(numbers, dtype=torch.float64, device=device)
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(every, mine)
    return [tuple(of_all) for of_all in torch.stack(every, dim=1).tolist()]


def summarise(
    job: flags.Job, done: list[Batch], elapsed: float, peaks: list[int], device: torch.device
) -> None:
    """The original's last lines, and the JSON file, by rank 0."""
    later = sum(max(batch.seconds) for batch in done[1:])
    throughput = job.words * len(done[1:]) / later if later else None
    tell(RULE)
    if throughput is None:
        tell("Throughput(wps) is not known: the first batch does not count, and was the only one.")
    else:
        tell(f"Throughput(wps) is {throughput:.2f}.")
    tell(f"Elapsed time(s) is {elapsed:.2f}.")
    for rank, peak in enumerate(peaks):
        where = f"{PEAK[device.type]} bytes on {device.type}:{rank}"
        tell(f"Peak {where}: {peak} ({peak / 2**30:.4f} GiB)")
    if job.options.json is not None and dist.get_rank() == 0:
        result: dict[str, Any] = {
            **hardware.describe(),
            "strategy": job.strategy.name,
            "arguments": vars(job.options),
            "batches": [{**asdict(batch), "loss": batch.loss} for batch in done],
            "words_per_second": throughput,
            "elapsed_seconds": elapsed,
            "peak_bytes": peaks,
        }
        report.replace(job.options.json, json.dumps(result, indent=2, default=str) + "\n")
