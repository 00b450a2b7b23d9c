"""A trace of a training step, with a range for every layer: where the time goes, and what waits.

    torchrun --nproc_per_node=2 examples/timeline.py --out runs/timeline

Each rank writes ``rank<r>.json``, which https://ui.perfetto.dev and chrome://tracing open. Ranges
of this library are called ``RTP::forward (blocks.0.gate)`` and the like; on a GPU each of them is
there twice: where the host launches it, and where the device runs it. Rank 0 prints the longest.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile, schedule

from launch import launch, leave
from llama import Llama, Shape
from report import tell
from rtp_wrap import RotatedTensorParallel

#: The first step of a profiler is slow, and so are a model's first ones.
WARMUP, TRACED = 3, 2
#: Tokens per rank are [1, T]; those of the CPU's model are few.
SHAPES = {
    "cpu": (Shape(layers=2, dim=256, ffn=512, heads=4, kv_heads=2, vocab=512), 32),
    "cuda": (Shape(layers=8, dim=4096, ffn=14336, heads=32, kv_heads=8, vocab=32000), 4096),
}


def main() -> None:
    """Train a few steps of which the last ones are traced."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/timeline"), help="a directory")
    parser.add_argument("--top", type=int, default=12, help="ranges that are printed")
    options = parser.parse_args()
    launch(__file__)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group(device_id=device if device.type == "cuda" else None)
    shape, tokens = SHAPES[device.type]
    torch.manual_seed(dist.get_rank())
    with torch.device("meta"):
        dense = Llama(shape).bfloat16()
    model = RotatedTensorParallel(dense)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    batch = torch.randint(shape.vocab, (1, tokens + 1), device=device)

    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    steps = schedule(wait=WARMUP - 1, warmup=1, active=TRACED, repeat=1)
    with profile(activities=activities, schedule=steps) as trace:
        for _ in range(WARMUP + TRACED):
            logits = model(batch[:, :-1])
            F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
            trace.step()
    options.out.mkdir(parents=True, exist_ok=True)
    trace.export_chrome_trace(str(options.out / f"rank{dist.get_rank()}.json"))
    tell(_longest(trace, options.top))
    tell(f"traces of {dist.get_world_size()} ranks are in {options.out}")
    leave()


def _longest(trace: profile, count: int) -> str:
    """The ranges that take longest, with what they take of the host and of the GPU in a step."""
    ranges = [
        (each.device_time_total, each.cpu_time_total, each.key)
        for each in trace.key_averages()
        if each.key.startswith("RTP::") and each.device_type.name == "CPU"
    ]
    lines = [f"{'GPU, ms/step':>12} {'host, ms/step':>14}  range"]
    for device, host, name in sorted(ranges, reverse=True)[:count]:
        on_device, on_host = (1e-3 * microseconds / TRACED for microseconds in (device, host))
        lines.append(f"{on_device:12.3f} {on_host:14.3f}  {name}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
