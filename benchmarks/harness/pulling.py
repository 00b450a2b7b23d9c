"""How long a training step takes on N ranks of one host that pull tiles from each other.

All ranks pull at a time, each from all others; ``b`` bytes into every rank, the barrier before
them included, take ``α + b / β`` seconds. Beside a pull products keep the share ``k`` of their
speed. What a rank copies in its own memory takes ``γ`` seconds per byte that is read or written.

Rotate      Of a weight of ``W`` bytes a rank pulls (N-1)/N W in forward and again in backward, and
            of its gradient of ``G`` bytes, others' parts of its own tile, (N-1)/N G. All that is
            ahead of the products, or behind them, so that only the sums over a step count, of pulls
            ``p`` and of products ``c``:

                max(p, c + (1 - k) p)

            It is published twice, which reads and writes W/N each time, and the mean reads G and
            writes G/N: (4 W + (N+1) G) / N bytes, beside nothing. Of an embedding's table no
            product needs more than the batch's rows, if those are fewer, nor anything in backward.
Step        That, and what ``communication`` says of the rest: collectives, 1/N of the optimizer.

Ranks wait for the slowest of them at every layer; that, and small tiles' own times, are left out.
Bytes are those in the dtype of the products: what is cast on its way from and to wider weights
(mixed precision) counts as if it were not wider.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from harness.communication import Compute, Fabric, Link, besides, rotated_uses
from rtp_wrap import Plan


@dataclass(frozen=True)
class Peers:
    """What a host's ranks pull with: α and 1/β, the share ``kept``, and γ."""

    pull: Link
    kept: float
    per_copied_byte: float


def peers(plan: Plan, compute: Compute, fabric: Fabric, host: Peers) -> float:
    """Seconds of a step of ``rtp_wrap`` on ``plan.world_size`` ranks, each with all of ``compute``.

    Of peers with overlap; every parameter is trained.
    """
    ranks, per_flop = plan.world_size, compute.seconds_per_flop(plan)
    others = (ranks - 1) / ranks
    products, pulls, copied = compute.attention_flops * per_flop, 0.0, 0.0
    for parameter, use in rotated_uses(plan):
        products += 3 * compute.product_flops(use, parameter) * per_flop
        if ranks == 1:
            continue
        # Parts of gradients travel in the dtype of the products that they are.
        itemsize = plan.mixed_precision.compute_dtype(parameter.dtype).itemsize
        weight = math.prod(parameter.shape) * itemsize
        rows = compute.tokens * math.prod(parameter.shape[1:]) * itemsize
        if use.passes_gradient:
            pulls += 2 * host.pull.seconds(others * weight)
            copied += 4 * weight / ranks
        else:
            pulls += host.pull.seconds(others * min(weight, rows))
            copied += 2 * weight / ranks
        pulls += host.pull.seconds(others * weight)
        copied += (ranks + 1) * weight / ranks
    seconds = max(pulls, products + (1 - host.kept) * pulls) + copied * host.per_copied_byte
    return seconds + besides(plan, compute, fabric)
