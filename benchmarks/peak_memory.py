"""Peak memory of a training step against what the shapes predict.

    torchrun --nproc_per_node=4 benchmarks/peak_memory.py

A Llama-shaped model of at least 1B parameters is wrapped and trained for a few steps. The
prediction uses nothing but shapes: home shards, their gradients and Adam's state, the staging,
and what is alive at the moments that can be the peak:

    start of backward   what autograd saved in forward, the logits' gradient and the loss's
    end of backward     all gradients, and that of one tile of the embedding, which is added then
    optimizer           all gradients

A short sequence makes the end of backward the peak, a long one its start. On CUDA the peak is
the allocator's; elsewhere there is no such counter, and only the prediction is printed.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor

from rtp_wrap import RotatedTensorParallel, ShardingPolicy

MIB = 1 << 20


@dataclass(frozen=True)
class Shape:
    """Sizes of the model and of one rank's batch."""

    layers: int
    dim: int
    ffn: int
    heads: int
    vocab: int
    tokens: int

    def parameters(self) -> int:
        """Elements, without the norms' few."""
        block = 4 * self.dim**2 + 3 * self.dim * self.ffn
        return self.layers * block + 2 * self.vocab * self.dim

    def saved(self, item: int) -> int:
        """Bytes that autograd saves in a forward, with ``item`` bytes an element.

        A block saves, per token: both norms' inputs and outputs (4 dim), q, k, v and the
        attention's output (4 dim), gate, up, silu(gate) and their product (4 ffn), and the
        attention's fp32 log-sum-exp per head. Behind the blocks: the norm's input and output,
        and the log-softmax.
        """
        block = (8 * self.dim + 4 * self.ffn) * item + 4 * self.heads
        return self.tokens * (self.layers * block + (2 * self.dim + self.vocab) * item)


#: Weights' shards are whole MiB at 2, 4 and 8 ranks, so the allocator's rounding stays small.
SHAPES = {
    "1b": Shape(layers=18, dim=2048, ffn=8192, heads=16, vocab=32000, tokens=8192),
    "1b-short": Shape(layers=18, dim=2048, ffn=8192, heads=16, vocab=32000, tokens=256),
    "2b": Shape(layers=8, dim=4096, ffn=14336, heads=32, vocab=32000, tokens=8192),
    "tiny": Shape(layers=2, dim=64, ffn=128, heads=4, vocab=512, tokens=32),
}


class Block(nn.Module):
    """Pre-norm attention and a gated MLP."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.norm1, self.norm2 = nn.RMSNorm(shape.dim), nn.RMSNorm(shape.dim)
        self.qkv = nn.Linear(shape.dim, 3 * shape.dim, bias=False)
        self.out = nn.Linear(shape.dim, shape.dim, bias=False)
        self.gate = nn.Linear(shape.dim, shape.ffn, bias=False)
        self.up = nn.Linear(shape.dim, shape.ffn, bias=False)
        self.down = nn.Linear(shape.ffn, shape.dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, dim = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, -1).transpose(1, 3)
        q, k, v = qkv.unbind(2)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, tokens, dim))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Model(nn.Module):
    """Embedding, blocks, untied head."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocab, shape.dim)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.dim)
        self.head = nn.Linear(shape.dim, shape.vocab, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


@dataclass(frozen=True)
class Prediction:
    """Bytes per rank, from shapes; ``resting`` is what stays allocated between steps."""

    resting: int
    start_of_backward: int
    end_of_backward: int
    optimizer: int

    @property
    def peak(self) -> int:
        return max(self.start_of_backward, self.end_of_backward, self.optimizer)


def predict(model: RotatedTensorParallel, shape: Shape) -> Prediction:
    """What one rank allocates for parameters, Adam's two moments and the step's transients."""
    home = sum(p.to_local().nbytes for p in model.parameters() if isinstance(p, DTensor))
    item = next(model.parameters()).itemsize
    logits = shape.tokens * shape.vocab * item
    shard = shape.vocab // dist.get_world_size() * shape.dim * item
    tile = min(model.staging_bytes // 2, shard)
    resting = 3 * home + model.staging_bytes
    return Prediction(
        resting=resting,
        start_of_backward=resting + shape.saved(item) + 2 * logits,
        end_of_backward=resting + home + tile,
        optimizer=resting + home,
    )


def main() -> None:
    """Wrap, train, compare; rank 0 prints a table and a JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--staging-mib", type=int, default=64)
    parser.add_argument("--inplace", action="store_true")
    parser.add_argument("--steps", type=int, default=4)
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        warm = torch.randn(256, 256, device=device, dtype=torch.bfloat16, requires_grad=True)
        (warm @ warm).sum().backward()  # cuBLAS keeps a workspace from its first product on
        del warm
    dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    before = torch.cuda.memory_allocated() if cuda else 0

    torch.set_default_dtype(torch.bfloat16)
    # By hops: their staging is the allocator's, whose peak is compared.
    policy = ShardingPolicy(staging_bytes=arguments.staging_mib * MIB, transport="ring")
    model = RotatedTensorParallel(Model(shape), inplace=arguments.inplace, policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    prediction = predict(model, shape)
    generator = torch.Generator().manual_seed(dist.get_rank())
    tokens = torch.randint(shape.vocab, (shape.tokens + 1,), generator=generator).to(device)
    for step in range(arguments.steps):
        if cuda and step == 1:  # Adam's state exists from the first step on
            torch.cuda.reset_peak_memory_stats()
        loss = F.cross_entropy(model(tokens[None, :-1]).flatten(0, 1), tokens[1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    measured = torch.cuda.max_memory_allocated() - before if cuda else None
    if dist.get_rank() == 0:
        report(arguments, shape, prediction, measured)
    dist.destroy_process_group()


def report(
    arguments: argparse.Namespace, shape: Shape, prediction: Prediction, measured: int | None
) -> None:
    """A few lines for people, one for programs."""
    print(f"{shape}: {shape.parameters() / 1e9:.2f}B parameters, {dist.get_world_size()} ranks")
    for name, value in [*asdict(prediction).items(), ("peak", prediction.peak)]:
        print(f"  predicted {name:18} {value / MIB:10.1f} MiB")
    if measured is not None:
        off = measured / prediction.peak - 1
        print(f"  measured  {'peak':18} {measured / MIB:10.1f} MiB  ({off:+.2%} of the prediction)")
    row = {**vars(arguments), "ranks": dist.get_world_size(), **asdict(prediction)}
    print(json.dumps({**row, "measured": measured, "torch": torch.__version__}))


if __name__ == "__main__":
    main()
