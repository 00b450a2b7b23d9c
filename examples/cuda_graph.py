"""A training step as one CUDA graph: nothing of it is launched by the host any more.

    torchrun --nproc_per_node=2 examples/cuda_graph.py

For small batches, where the host takes longer to launch a step than the GPUs to do it. Capturing
needs the peer transport (GPUs of one host that read each other's memory), an optimizer with
``capturable=True``, and inputs that stay in one place.
"""

from __future__ import annotations

import os
import time
from dataclasses import replace

import torch
import torch.distributed as dist
import torch.nn.functional as F

from llama import SHAPES, Llama
from report import tell
from rtp_wrap import RotatedTensorParallel

TOKENS, WARMUP, STEPS = 512, 3, 20


def main() -> None:
    """Train eagerly, then by replays; rank 0 prints what a step takes."""
    if not torch.cuda.is_available():
        raise SystemExit("CUDA graphs need GPUs, which are not here")
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl", device_id=torch.device("cuda", torch.cuda.current_device()))
    torch.manual_seed(0)
    shape = replace(SHAPES["1b"], layers=8, vocab=32000)
    with torch.device("cuda"):
        model = RotatedTensorParallel(Llama(shape).bfloat16())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True, capturable=True)
    tokens = torch.randint(shape.vocab, (1, TOKENS + 1), device="cuda")

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        return loss.detach()

    # On a stream of its own, as torch.cuda.graph captures on one: what autograd and the optimizer
    # keep from one step to the next belongs to it.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARMUP):
            step()
        eager = _seconds(step)
    torch.cuda.current_stream().wait_stream(stream)

    graph = torch.cuda.CUDAGraph()
    # "thread_local": other threads, such as NCCL's watchdog, may call CUDA meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        loss = step()
    replayed = _seconds(graph.replay)
    if dist.get_rank() == 0:
        tell(f"eager {1e3 * eager:.1f} ms/step, replayed {1e3 * replayed:.1f} ms/step")
        tell(f"loss {loss.item():.4f}")
    dist.barrier()
    dist.destroy_process_group()


def _seconds(step: object) -> float:
    assert callable(step)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(STEPS):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / STEPS


if __name__ == "__main__":
    main()
