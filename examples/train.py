"""Train a byte-level transformer on real text while every rank keeps 1/N of it.

    python examples/train.py                                  every GPU, or two CPU ranks
    torchrun --nproc_per_node=4 examples/train.py --steps 200

The text is the source of Python's standard library; --data FILE takes another.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from checkpoint import save_and_prove
from launch import launch, leave
from model import VOCABULARY, ByteTransformer
from report import Bytes, progress, size, table, tell, training_state
from rtp_wrap import RotatedTensorParallel
from text import Text, read_text

VALIDATION_BATCHES = 8
MEMORY = {
    "cpu": "bytes of parameters, gradients and Adam state",
    "cuda": "the allocator's peak, and the staging if it is not the allocator's",
}


@dataclass(frozen=True)
class Preset:
    """A model's size and the training that suits it; batch_size counts sequences per rank."""

    layers: int
    width: int
    heads: int
    seq_len: int
    batch_size: int
    steps: int
    lr: float


PRESETS = {
    "tiny": Preset(1, 128, 2, seq_len=32, batch_size=8, steps=40, lr=3e-3),
    "small": Preset(4, 128, 4, seq_len=128, batch_size=16, steps=300, lr=3e-3),
    "large": Preset(16, 1024, 16, seq_len=1024, batch_size=16, steps=1000, lr=3e-4),
}


def main() -> None:
    parser = arguments()
    chosen, _ = parser.parse_known_args()
    parser.set_defaults(**asdict(PRESETS[chosen.preset]))
    options = parser.parse_args()
    try:
        text = Text(read_text(options.data, options.max_bytes), options.seq_len)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    launch(__file__)
    if not run(options, text):
        sys.exit(128 + signal.SIGINT)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    default = "large" if torch.cuda.is_available() else "small"
    add("--preset", choices=PRESETS, default=default, help="default here: %(default)s")
    for name, kind in Preset.__annotations__.items():
        flag = "--" + name.replace("_", "-")
        add(flag, type=float if kind == "float" else int, help="default: the preset's")
    add("--data", type=Path, metavar="FILE", help="train on the bytes of FILE")
    add("--max-bytes", type=int, default=32 << 20, help="read no more text; default: %(default)s")
    add("--inplace", action="store_true", help="least staging, transfers not overlapped")
    add("--seed", type=int, default=0, help="of weights, batches and sample; default: %(default)s")
    add("--out", type=Path, default=Path("runs/train"), help="the checkpoint; default: %(default)s")
    add("--prompt", default="def ", help="how the sample begins; default: %(default)r")
    add("--sample-bytes", type=int, default=400, help="default: %(default)s")
    add("--temperature", type=float, default=0.7, help="0 is greedy; default: %(default)s")
    return parser


def run(options: argparse.Namespace, text: Text) -> bool:
    """Train, validate, save and sample on this rank; return False if interrupted."""
    # Ctrl-C ends a rank at once, even where it waits for another one; see interruptions().
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group(device_id=device if device.type == "cuda" else None)

    torch.manual_seed(options.seed)
    dense = ByteTransformer(options.layers, options.width, options.heads, options.seq_len)
    model = RotatedTensorParallel(dense, inplace=options.inplace)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.1)
    tell(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, "
        f"{len(text.training):,} bytes of text, {dist.get_world_size()} {device.type} ranks"
    )
    tell(f"below: tokens/s of all ranks, {MEMORY[device.type]} of rank 0")
    held = train(model, optimizer, text, options, device)
    if held:
        finish(model, optimizer, text, options, device)
        tell(table(held, device))
    leave()
    return bool(held)


def finish(
    model: RotatedTensorParallel,
    optimizer: torch.optim.Optimizer,
    text: Text,
    options: argparse.Namespace,
    device: torch.device,
) -> None:
    """Validate, save, prove that what was saved is the model, and let it write."""
    optimizer.zero_grad()
    loss = validate(model, text, options, device)
    tell(f"validation loss {loss:.3f} nats per byte (guessing: {math.log(VOCABULARY):.3f})")
    tensors = save_and_prove(model, optimizer, options.out)
    again = validate(model, text, options, device)
    if again != loss:
        raise RuntimeError(f"{options.out} reloaded, validation loss {loss} became {again}")
    tell(f"checkpoint {options.out}: {tensors} tensors erased on each rank and reloaded,")
    tell(f"all equal bit for bit; validation loss {again:.3f} again")
    tell(f"\n--- sample, temperature {options.temperature:g} ---")
    tell(sample(model, options, device) + "\n---\n")


def train(
    model: RotatedTensorParallel,
    optimizer: torch.optim.Optimizer,
    text: Text,
    options: argparse.Namespace,
    device: torch.device,
) -> dict[str, Bytes]:
    """Take the steps; return the bytes held between two of them, nothing if interrupted."""
    seed = 1000 * (options.seed + 1) + dist.get_rank()  # every rank its own batches
    batches = text.batches(text.training, options.batch_size, seed, device)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_then_cosine(options.steps))
    stride = min(20, max(1, options.steps // 50))  # steps between two reports
    since = torch.zeros(3, device=device)  # the last report: losses, steps, interruptions
    held: dict[str, Bytes] = {}
    interrupted = 0.0
    model.train()
    with progress(options.steps) as report, interruptions() as caught:
        started = time.perf_counter()
        for step in range(1, options.steps + 1):
            loss = loss_of(model, *next(batches))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()

            since[0] += loss.detach()
            since[1] += 1
            if step % stride and step != options.steps:
                continue
            since[2] = len(caught)
            dist.all_reduce(since)  # all ranks learn the mean loss, and stop after the same step
            losses, steps, interrupted = since.tolist()
            since.zero_()
            now = time.perf_counter()
            tokens = steps * options.batch_size * options.seq_len / (now - started)
            started = now
            held = training_state(model, optimizer)
            report(
                step,
                f"loss {losses / steps:.3f}  {tokens:,.0f} tokens/s  {memory(model, held, device)}",
            )
            if interrupted:
                break
    if interrupted:
        tell(f"interrupted after step {step}, nothing saved")
    return {} if interrupted else held


def loss_of(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross entropy, in nats per byte."""
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=tokens.is_cuda):
        logits = model(tokens)  # [B, T, V]
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def warmup_then_cosine(steps: int) -> Callable[[int], float]:
    """Return the factor of the learning rate: up over 5 % of the steps, then down to a tenth."""
    warmup = max(1, steps // 20)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(1, steps - warmup)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * done))

    return factor


@contextmanager
def interruptions() -> Iterator[list[int]]:
    """Collect Ctrl-C, so that all ranks can agree to leave after the same step."""
    caught: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: caught.append(number))
    try:
        yield caught
    finally:
        signal.signal(signal.SIGINT, previous)


def memory(model: RotatedTensorParallel, held: dict[str, Bytes], device: torch.device) -> str:
    """Return this rank's bytes, the ones that `MEMORY` names."""
    if device.type == "cuda":
        staging = model.staging_bytes if model.transport == "peer" else 0
        return size(torch.cuda.max_memory_allocated(device) + staging)
    return size(sum(held.values(), Bytes(0, 0)).here)


@torch.no_grad()
def validate(
    model: nn.Module, text: Text, options: argparse.Namespace, device: torch.device
) -> float:
    """Return the mean loss over the same held-out batches each time, other ones on each rank."""
    model.eval()
    batches = text.batches(text.validation, options.batch_size, dist.get_rank(), device)
    total = torch.stack([loss_of(model, *next(batches)) for _ in range(VALIDATION_BATCHES)]).sum()
    dist.all_reduce(total)
    return total.item() / (VALIDATION_BATCHES * dist.get_world_size())


@torch.no_grad()
def sample(model: nn.Module, options: argparse.Namespace, device: torch.device) -> str:
    """Continue the prompt; every rank does it, as each holds a part of every layer."""
    model.eval()
    generator = torch.Generator().manual_seed(options.seed)
    written = list(options.prompt.encode())
    for _ in range(options.sample_bytes):
        tokens = torch.tensor([written[-options.seq_len :]], device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(tokens)[0, -1].float().cpu()  # [V]
        if options.temperature > 0:
            chances = (logits / options.temperature).softmax(0)
            written.append(int(torch.multinomial(chances, 1, generator=generator)))
        else:
            written.append(int(logits.argmax()))
    return bytes(written).decode(errors="replace")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
