"""The bytes a rank sends in one step, by formula.

For N ranks, weights of B bytes in the dtype that is computed in, and gradients of G bytes in the
dtype that is reduced in, with ring algorithms:

    single          nothing
    dp              all-reduce: 2 (N-1)/N G
    fsdp-root       all-gather, reduce-scatter: (N-1)/N (B + G), as the root unit stays gathered
    fsdp            the same for the root; blocks are gathered again in backward: (N-1)/N (2 B + G)
    tp              an all-gather or a reduce-scatter of activations of A bytes, those of all ranks'
                    tokens, is (N-1)/N A. A block has four in forward, and their mirror images in
                    backward; the head has one and its mirror image, the embedding too (of a
                    transformer, which adds positions to whole sequences, it is an all-reduce and an
                    all-gather). The loss all-reduces three numbers per token.
    rtp             what rtp_wrap's plan says of rank 0: (N-1)/N (2 B + G) where all are rotated
    fsdp-hybrid     in R rings of N/R ranks: the same as fsdp within a ring, and an all-reduce of
                    what a rank owns of the gradients: 2 (R-1)/R G R/N
    rtp-hybrid      what rtp_wrap's plan says of rank 0 of such rings

Checkpointed blocks rotate once more; tensor parallel ones communicate as in forward once more, but
for the last sum where nothing in the block needs it. FSDP2 pads weights to a multiple of N rows.
Not counted: the gradients of tensor parallel norms, and what a compiler makes of such a block.
"""

from __future__ import annotations

import torch
from torch import nn

import llama
from harness.strategies import STRATEGIES, rings_of, rtp_options
from harness.trial import Trial
from rtp_wrap import Rotate, plan


def per_step(trial: Trial, ranks: int) -> int:
    """Bytes that one of ``ranks`` sends for ``trial``.

    Raises ``ValueError`` for a strategy without a formula.
    """
    if trial.strategy == "single":
        return 0
    model = trial.spec().build().to(trial.setting.dtype)
    if trial.strategy == "dp":
        gradients = sum(parameter.nbytes for parameter in model.parameters())
        return 2 * (ranks - 1) * gradients // ranks
    if trial.strategy in ("fsdp", "fsdp-root", "fsdp-hybrid"):
        return _fsdp2(trial, model, ranks)
    if trial.strategy == "tp":
        return _tensor_parallel(trial, ranks)
    if trial.strategy in ("rtp", "rtp-graph", "rtp-ring", "rtp-inplace", "rtp-hybrid"):
        return _rtp(trial, model, ranks)
    raise ValueError(f"no formula for {trial.strategy!r}; there are {', '.join(STRATEGIES)}")


def _fsdp2(trial: Trial, model: nn.Module, ranks: int) -> int:
    weight, gradient = trial.setting.compute_dtype.itemsize, trial.setting.dtype.itemsize
    rings = rings_of(trial.strategy)
    ranks //= rings
    sent = 0
    for name, parameter in model.named_parameters():
        rows, *rest = parameter.shape
        shard = -(-rows // ranks) * torch.Size(rest).numel()
        gathers = 1 if trial.strategy == "fsdp-root" or not name.startswith("blocks.") else 2
        sent += (ranks - 1) * shard * (gathers * weight + gradient)
        sent += 2 * (rings - 1) * shard * gradient // rings
    return sent


def _tensor_parallel(trial: Trial, ranks: int) -> int:
    spec = trial.spec()
    gated = isinstance(spec.shape, llama.Shape)
    # What linears put out is in the dtype that is computed in, what norms do in the parameters'.
    linear, norm = trial.setting.compute_dtype.itemsize, trial.setting.dtype.itemsize
    block = 4 * norm + 4 * linear
    if trial.setting.checkpointing:  # a block that ends in a norm needs its last sum for that
        block += 2 * norm + (1 if gated else 2) * linear
    ends = (4 if gated else 5) * norm
    loss = 2 * (linear + 2 * torch.float32.itemsize)  # the largest logit; two sums
    tokens = ranks * trial.tokens
    return (ranks - 1) * tokens * (spec.dim * (spec.layers * block + ends) + loss) // ranks


def _rtp(trial: Trial, model: nn.Module, ranks: int) -> int:
    inplace = trial.strategy == "rtp-inplace"
    rings = rings_of(trial.strategy)
    ranks //= rings
    options = rtp_options(trial.setting, "ring" if trial.strategy == "rtp-ring" else "auto")
    planned = plan(model, world_size=ranks, replicas=rings, inplace=inplace, **options)
    sent = planned.total_traffic().nbytes
    if trial.setting.checkpointing:
        again = [
            each.shard_bytes(ranks) // each.dtype.itemsize
            for each in planned.parameters
            if each.fqn.startswith("blocks.") and isinstance(each.home, Rotate)
        ]
        sent += (ranks - 1) * sum(again) * trial.setting.compute_dtype.itemsize
    return sent
