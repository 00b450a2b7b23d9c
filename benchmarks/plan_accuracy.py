"""A plan's predicted bytes against what the allocator counts.

    torchrun --nproc_per_node=2 benchmarks/plan_accuracy.py

For each family the plan is made from a model on the meta device, without looking at the GPU. Then
the model is wrapped and one forward and backward run. Parameters, gradients and staging are
counted from the tensors themselves and must be equal; activations are what the allocator has more
after the forward than before it.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import rtp_wrap
from peak_memory import MIB, Model, Shape
from rtp_wrap import MixedPrecisionPolicy, RotatedTensorParallel


class Decoder(nn.Module):
    """Llama-shaped, with its loss, so that nothing but a number comes out."""

    def __init__(self, small: bool) -> None:
        super().__init__()
        sizes = (2, 64, 128, 4, 512, 32) if small else (8, 2048, 8192, 16, 32000, 4096)
        self.shape = Shape(*sizes)
        self.model = Model(self.shape)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.model(tokens[None, :-1]).flatten(0, 1), tokens[1:])

    def example(self) -> torch.Tensor:
        return torch.zeros(self.shape.tokens + 1, dtype=torch.long)


class VisionTransformer(nn.Module):
    """Patches through a convolution, then ``nn.TransformerEncoder``."""

    def __init__(self, small: bool) -> None:
        super().__init__()
        self.images, self.side = (2, 32) if small else (64, 224)
        width, heads, layers = (32, 4, 2) if small else (1024, 16, 12)
        self.patches = nn.Conv2d(3, width, 16, 16)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, 0.0, F.gelu, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 1000)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.encoder(self.patches(images).flatten(2).transpose(1, 2))
        return self.head(x.mean(1)).square().mean()

    def example(self) -> torch.Tensor:
        return torch.zeros(self.images, 3, self.side, self.side)


FAMILIES: dict[str, Callable[[bool], Decoder | VisionTransformer]] = {
    "decoder": Decoder,
    "vision": VisionTransformer,
}


def measure(name: str, small: bool, device: torch.device, precision: MixedPrecisionPolicy) -> None:
    """Plan, wrap, run, compare; rank 0 prints a line for people and one for programs."""
    with torch.device("meta"):
        plan = rtp_wrap.plan(
            (meta := FAMILIES[name](small)),
            world_size=dist.get_world_size(),
            mixed_precision=precision,
            example_inputs=meta.example(),
        )
    torch.manual_seed(0)
    dense = FAMILIES[name](small)
    model = RotatedTensorParallel(dense, plan=plan)
    batch = dense.example().to(device)
    model(batch).backward()  # buffers of libraries exist from the first step on
    model.zero_grad()
    before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    loss = model(batch)
    held = torch.cuda.memory_allocated() - before if device.type == "cuda" else None
    loss.backward()
    rank = dist.get_rank()
    exact = {
        "parameters": (plan.parameter_bytes(rank), _bytes(p for p in model.parameters())),
        "gradients": (plan.gradient_bytes(rank), _bytes(p.grad for p in model.parameters())),
        "staging": (plan.staging_bytes, model.staging_bytes),
    }
    for what, (predicted, counted) in exact.items():
        if predicted != counted:
            raise AssertionError(f"{name}: {what} {predicted} predicted, {counted} allocated")
    if rank == 0:
        predicted = plan.activation_bytes or 0
        text = f"{name}: parameters, gradients and staging as predicted; activations "
        text += f"{predicted / MIB:.1f} MiB predicted"
        if held is not None:
            text += f", {held / MIB:.1f} MiB allocated ({predicted / held - 1:+.2%})"
        print(text)
        row = {"family": name, "ranks": dist.get_world_size(), "predicted": predicted}
        print(json.dumps({**row, "allocated": held, "param_dtype": str(precision.param_dtype)}))


def _bytes(tensors: object) -> int:
    return sum(tensor.to_local().nbytes for tensor in tensors)  # type: ignore[attr-defined]


def main() -> None:
    """Every family, in fp32 and with bf16 computation."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="tiny sizes, for a try on the CPU")
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    for name in FAMILIES:
        for param_dtype in (None, torch.bfloat16):
            measure(name, arguments.small, device, MixedPrecisionPolicy(param_dtype=param_dtype))
            torch.cuda.empty_cache()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
