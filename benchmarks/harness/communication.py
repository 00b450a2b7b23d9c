"""How long a training step takes on N ranks: a model of what is sent, and of what hides it.

Of rotations by hops, and of collectives; ``pulling`` has rotations by peers.

A hop of ``b`` bytes takes ``h(b) = α + b / β`` seconds. Beside one, products keep the share ``k``
of their speed, so that products of ``p`` seconds and a hop of ``h`` that start together take

    turn(h, p) = max(h, p + (1 - k) h)            k = 1: the shorter hides; k = 0: they take turns

Rotate      A weight's product takes ``c`` seconds on one rank. Its shard is cut into ``m`` tiles
            by the staging; a tile has ``w`` bytes, its accumulator ``a``, its product takes
            ``p = c / (N m)``, but not less than the floor of a kernel. ``rtp_wrap.ops.rotate`` does

                forward    m [(N-1) turn(h(w), p) + p]
                backward   m [turn(h(w), p) + (N-2) turn(h(w + a), p) + turn(h(a), p) + N p]

            In backward the first turn brings a weight alone, the last an accumulator alone, those
            between both in one batch: one α for the two. They hide behind dgrad; the N products of
            wgrad follow their turns with nothing in flight. Lookups (embeddings) have no dgrad, so
            no weight travels in their backward, and they count as no time to compute.
Gather      A ring all-gather or reduce-scatter of ``B`` bytes takes λ + (N-1) σ + (N-1)/N B / β',
            where λ starts it and σ is a step of its ring. One in forward, two in backward, hidden
            by nothing.
Replicate   One ring all-reduce of all of them: λ + 2 (N-1) σ + 2 (N-1)/N B / β'.
Step        Rotations, collectives, what is no rotated product, and 1/N of the optimizer's time.

One rank's step less its optimizer's time is split in proportion to FLOPs: 2 per token and weight
and pass, and 6 T D per token and layer for causal attention over T tokens of D features, forward
and backward. So norms, activations and the loss count as parts of products. What ranks do on the
host for every step (comparing what they ran) is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rtp_wrap import Gather, Plan, Replicate, Rotate
from rtp_wrap.hops import backward_slots
from rtp_wrap.planned import PlannedParameter, PlannedUse
from rtp_wrap.shard import TileGrid, extent
from rtp_wrap.traffic import Traffic
from rtp_wrap.transport import Staging

#: Seconds of a step of NCCL's ring over NVLink: hwLat[NVLINK][Ring][Simple], src/graph/tuning.cc.
RING_STEP = 3.4e-6


@dataclass(frozen=True)
class Link:
    """Takes ``latency`` seconds and ``per_byte`` seconds for each byte; nothing for no bytes."""

    latency: float
    per_byte: float

    def seconds(self, nbytes: float) -> float:
        return self.latency + nbytes * self.per_byte if nbytes else 0.0

    def misfit(self, samples: Sequence[tuple[int, float]]) -> float:
        """The largest relative error against measured (bytes, seconds)."""
        return max(abs(self.seconds(nbytes) / taken - 1) for nbytes, taken in samples)


def fit(samples: Sequence[tuple[int, float]]) -> Link:
    """The link with the least squares of relative errors against measured (bytes, seconds).

    Neither of its numbers is negative. Raises ``ValueError`` for fewer than two sizes.
    """
    if len({nbytes for nbytes, _ in samples}) < 2:
        raise ValueError(f"{samples} is of fewer than two sizes: nothing tells latency from rate")
    # Normal equations of 1 = α / t + s b / t over the samples (b, t).
    ones = sum(1 / t**2 for _, t in samples)
    mixed = sum(b / t**2 for b, t in samples)
    squares = sum(b**2 / t**2 for b, t in samples)
    left, right = sum(1 / t for _, t in samples), sum(b / t for b, t in samples)
    determinant = ones * squares - mixed**2
    latency = (left * squares - right * mixed) / determinant
    per_byte = (right * ones - left * mixed) / determinant
    if latency < 0:
        return Link(0.0, right / squares)
    if per_byte < 0:
        return Link(left / ones, 0.0)
    return Link(latency, per_byte)


@dataclass(frozen=True)
class Network:
    """Between nodes: ``gbps`` (10⁹ bits/s) per GPU, ``latency`` in seconds more than within one."""

    gpus_per_node: int
    gbps: float
    latency: float

    @property
    def per_byte(self) -> float:
        return 8e-9 / self.gbps


@dataclass(frozen=True)
class Fabric:
    """What moves bytes: hops (α, 1/β), collectives (λ, 1/β'), their ring's step σ, the share k."""

    hop: Link
    collective: Link
    ring_step: float
    kept: float

    def between(self, network: Network, ports: int) -> Fabric:
        """The same for ranks on several nodes, whose rings are as slow as their slowest link.

        Hops go round one ring, which leaves a node through one port; collectives have a ring for
        each of the ``ports`` that their ranks have in a node.
        """
        return Fabric(
            Link(self.hop.latency + network.latency, max(self.hop.per_byte, network.per_byte)),
            Link(
                self.collective.latency,
                max(self.collective.per_byte, network.per_byte / ports),
            ),
            max(self.ring_step, network.latency),
            self.kept,
        )

    def turn(self, hop: float, products: float) -> float:
        """Seconds of a hop and of products beside it."""
        return max(hop, products + (1 - self.kept) * hop)

    def gather(self, nbytes: float, ranks: int) -> float:
        """Seconds of an all-gather or a reduce-scatter of ``nbytes`` in all."""
        if ranks == 1 or not nbytes:
            return 0.0
        return (ranks - 1) * self.ring_step + self.collective.seconds(nbytes * (ranks - 1) / ranks)

    def average(self, nbytes: float, ranks: int) -> float:
        """Seconds of an all-reduce of ``nbytes``."""
        if ranks == 1 or not nbytes:
            return 0.0
        steps = 2 * (ranks - 1)
        return steps * self.ring_step + self.collective.seconds(nbytes * steps / ranks)


@dataclass(frozen=True)
class Compute:
    """The step of one rank and its optimizer's part, in seconds, and the work that it was.

    ``floor`` is the time in seconds of a product of however few rows; a step has ``tokens``, and
    ``attention_flops`` besides those of its weights.
    """

    step: float
    optimizer: float
    floor: float
    tokens: int
    attention_flops: float

    def seconds_per_flop(self, plan: Plan) -> float:
        weights = sum(self.product_flops(use, each) for each, use in _uses(plan))
        return (self.step - self.optimizer) / (3 * weights + self.attention_flops)

    def product_flops(self, use: PlannedUse, parameter: PlannedParameter) -> float:
        """Of one pass: forward, dgrad and wgrad have the same."""
        multiplies = use.passes_gradient and len(parameter.shape) > 1  # no lookup, bias or norm
        return 2.0 * self.tokens * math.prod(parameter.shape) if multiplies else 0.0

    def tile(self, product: float, pieces: int) -> float:
        """Seconds of one of ``pieces`` of a product that takes ``product``."""
        return max(product / pieces, min(product, self.floor))


@dataclass(frozen=True)
class Turns:
    """A rotation in one direction: ``owners`` products and ``hops`` hops for each of ``cells``.

    ``weight`` and ``accumulator`` are the bytes of one hop of each kind; 0 if that does not travel.
    """

    cells: int
    owners: int
    hops: int
    weight: float
    accumulator: float

    @property
    def traffic(self) -> Traffic:
        """What a rank sends."""
        hops = self.cells * self.hops
        lanes = (self.weight > 0) + (self.accumulator > 0)
        return Traffic(hops * lanes, round(hops * (self.weight + self.accumulator)))

    def forward(self, fabric: Fabric, product: float) -> float:
        """Seconds, where a tile's product takes ``product``."""
        beside = self.hops * fabric.turn(fabric.hop.seconds(self.weight), product)
        return self.cells * (beside + (self.owners - self.hops) * product)

    def backward(self, fabric: Fabric, product: float) -> float:
        """Seconds, where a tile's dgrad takes ``product``, and its wgrad as long."""
        if not self.hops:
            return self.cells * 2 * product
        first, last = fabric.hop.seconds(self.weight), fabric.hop.seconds(self.accumulator)
        between = fabric.hop.seconds(self.weight + self.accumulator)
        turns = fabric.turn(first, product) + fabric.turn(last, product)
        turns += (self.hops - 1) * fabric.turn(between, product)
        return self.cells * (turns + self.owners * product)


def rotations(plan: Plan, parameter: PlannedParameter, use: PlannedUse) -> tuple[Turns, Turns]:
    """Forward and backward of a rotated weight; together they send what ``plan.traffic`` says."""
    compute = plan.mixed_precision.compute_dtype(parameter.dtype)
    sums = plan.mixed_precision.accumulator_dtype(parameter.dtype)
    slots, widest = backward_slots(
        compute, sums, dgrad=use.passes_gradient, wgrad=True, overlap=not plan.inplace
    )
    assert isinstance(use.strategy, Rotate)
    dim = use.strategy.dim
    assert dim is not None
    first, last = extent(parameter.shape[dim], plan.world_size, 0)
    owners = -(-parameter.shape[dim] // (last - first))  # fewer than ranks if rows are fewer
    numel = math.prod(parameter.shard_shape(plan.world_size))

    def turns(limit: int, weight: int, accumulator: int) -> Turns:
        grid = TileGrid(parameter.shape, dim, plan.world_size, limit)
        cells = sum(1 for _ in grid.cells()) if plan.world_size > 1 else 1
        hops = min(plan.world_size - 1, owners)
        return Turns(cells, owners, hops, numel * weight / cells, numel * accumulator / cells)

    two, many = (Staging.slot_size(plan.staging_bytes, count) for count in (2, slots))
    return (
        turns(two // compute.itemsize, compute.itemsize, 0),
        turns(many // widest.itemsize, compute.itemsize * use.passes_gradient, sums.itemsize),
    )


def traffic(plan: Plan) -> Traffic:
    """``plan.total_traffic()`` of even shards, without going through all owners of each tile."""
    total = Traffic()
    for parameter in plan.parameters:
        if not isinstance(parameter.home, Rotate):
            total += plan.traffic(parameter)
    for parameter, use in rotated_uses(plan):
        forward, backward = rotations(plan, parameter, use)
        total += forward.traffic + backward.traffic
    return total


def ring(plan: Plan, compute: Compute, fabric: Fabric) -> float:
    """Seconds of a step of ``rtp_wrap`` on ``plan.world_size`` ranks, each with all of ``compute``.

    Of the point-to-point ring with overlap; every parameter is trained.
    """
    per_flop = compute.seconds_per_flop(plan)
    seconds = compute.attention_flops * per_flop
    for parameter, use in rotated_uses(plan):
        product = compute.product_flops(use, parameter) * per_flop
        forward, backward = rotations(plan, parameter, use)
        pieces = forward.owners * forward.cells, backward.owners * backward.cells
        seconds += forward.forward(fabric, compute.tile(product, pieces[0]))
        seconds += backward.backward(fabric, compute.tile(product, pieces[1]))
    return seconds + besides(plan, compute, fabric)


def besides(plan: Plan, compute: Compute, fabric: Fabric) -> float:
    """Seconds of a step of ``rtp_wrap`` for what is not rotated, and for the optimizer."""
    ranks, precision = plan.world_size, plan.mixed_precision
    per_flop = compute.seconds_per_flop(plan)
    seconds, replicated = compute.optimizer / ranks, 0
    for parameter, use in _uses(plan):
        if isinstance(use.strategy, Rotate):
            continue
        numel = math.prod(parameter.shape)
        seconds += 3 * compute.product_flops(use, parameter) * per_flop
        if isinstance(use.strategy, Gather):
            weight = numel * precision.compute_dtype(parameter.dtype).itemsize
            gradient = numel * precision.accumulator_dtype(parameter.dtype).itemsize
            seconds += (1 + use.passes_gradient) * fabric.gather(weight, ranks)
            seconds += fabric.gather(gradient, ranks)
        elif isinstance(use.strategy, Replicate):
            replicated += numel * precision.average_dtype(parameter.dtype).itemsize
    return seconds + fabric.average(replicated, ranks)


def fsdp(plan: Plan, compute: Compute, fabric: Fabric) -> float:
    """Seconds of a step of ``fully_shard`` of each block and the root, by formula alone.

    A block's all-gathers and reduce-scatter hide behind its neighbours' products, which they do not
    slow down; the root's and the first ones hide behind nothing. That flatters it.
    """
    ranks, precision, per_flop = (
        plan.world_size,
        plan.mixed_precision,
        compute.seconds_per_flop(plan),
    )
    weights: dict[str, int] = {}
    sums: dict[str, int] = {}
    products: dict[str, float] = {}
    for parameter, use in _uses(plan):
        unit = ".".join(use.fqn.split(".")[:2]) if use.fqn.startswith("blocks.") else ""
        numel = math.prod(parameter.shape)
        weights[unit] = weights.get(unit, 0) + (
            numel * precision.compute_dtype(parameter.dtype).itemsize
        )
        sums[unit] = sums.get(unit, 0) + (
            numel * precision.accumulator_dtype(parameter.dtype).itemsize
        )
        work = compute.product_flops(use, parameter) * per_flop
        products[unit] = products.get(unit, 0.0) + work
    blocks = [unit for unit in weights if unit]
    attention = compute.attention_flops * per_flop / len(blocks)
    gathers = [fabric.gather(weights[unit], ranks) for unit in blocks]
    scatters = [fabric.gather(sums[unit], ranks) for unit in blocks]
    root = fabric.gather(weights[""], ranks) + fabric.gather(sums[""], ranks) + 3 * products[""]
    forward = gathers[0] + sum(
        max(products[unit] + attention / 3, after)
        for unit, after in zip(blocks, [*gathers[1:], 0.0], strict=True)
    )
    backward = gathers[-1] + scatters[0]
    for index, unit in enumerate(blocks):  # the block below is gathered, that above is scattered
        below = gathers[index - 1] if index else 0.0
        above = scatters[index + 1] if index + 1 < len(blocks) else 0.0
        backward += max(2 * (products[unit] + attention / 3), below + above)
    return root + forward + backward + compute.optimizer / ranks


def hybrid(node: float, plan: Plan, fabric: Fabric, network: Network, nodes: int) -> float:
    """Seconds of a step of ``rtp_wrap`` in each of ``nodes``, data parallel between them.

    A step in one ``node`` takes so many seconds, and ``plan`` is one node's. After backward every
    rank averages its own gradients with its like on the other nodes, through a port of its own,
    hidden by nothing.
    """
    return node + fabric.between(network, ports=1).average(plan.gradient_bytes(), nodes)


def rotated_uses(plan: Plan) -> Iterator[tuple[PlannedParameter, PlannedUse]]:
    """The uses of rotated weights."""
    return (each for each in _uses(plan) if isinstance(each[1].strategy, Rotate))


def _uses(plan: Plan) -> Iterator[tuple[PlannedParameter, PlannedUse]]:
    return ((parameter, use) for parameter in plan.parameters for use in parameter.uses)
