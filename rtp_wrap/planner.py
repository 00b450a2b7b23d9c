"""Making plans, and following them.

A plan is made without a process group, without memory for the model, and for any number of ranks.
The wrapper executes a plan: its own, or one that is given to it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy as FSDP2MixedPrecisionPolicy

from rtp_wrap.assign import Assignment, assign
from rtp_wrap.casting import cast_inputs
from rtp_wrap.modules import precision_of, rotation_dim
from rtp_wrap.planned import Plan, PlannedParameter, PlannedUse
from rtp_wrap.policy import (
    MixedPrecisionPolicy,
    Rotate,
    Rules,
    ShardingPolicy,
)
from rtp_wrap.rings import Rings
from rtp_wrap.sites import outside_uses_of, pairs_of, sites_of
from rtp_wrap.trace import capture
from rtp_wrap.transport import likely, wanted
from rtp_wrap.transport.room import staging_for, tile_itemsize
from rtp_wrap.verify import check_module, check_uses

#: Default staging of the ring, bytes per rank: two tiles of 64 MiB in forward, four of 32 MiB in
#: backward.
STAGING_BYTES = 128 << 20
#: Default where tiles are pulled: seven slots of 128 MiB, so that most layers need not be cut.
PEER_STAGING_BYTES = 896 << 20
#: Default with ``inplace=True``: on a ring two tiles of 8 MiB in forward, three of 5 in backward;
#: five slots of 3 MiB for peers.
INPLACE_STAGING_BYTES = 16 << 20

#: Where the policy leaves it open, of ten layers one may be cut that would fit whole: staging for
#: all would be for the table of embeddings and the head, which are a few more pieces of a step.
WHOLE_LAYERS = 0.9
#: But not into pieces for which transfers are slow.
MIN_DEFAULT_STAGING_BYTES = 224 << 20

_DEFAULTS = {"ring": STAGING_BYTES, "peer": PEER_STAGING_BYTES}


def plan(
    model: nn.Module,
    *,
    world_size: int,
    policy: ShardingPolicy | Rules | None = None,
    mixed_precision: MixedPrecisionPolicy | FSDP2MixedPrecisionPolicy | None = None,
    inplace: bool = False,
    example_inputs: Any = None,
    replicas: int = 1,
) -> Plan:
    """What ``RotatedTensorParallel(model, ...)`` will do on ``world_size`` ranks.

    Or, with a 2-D mesh, in each of ``replicas`` rings of so many.

    Needs no process group, and no memory for the model: build it on the meta device.
    ``example_inputs`` is a tensor, a tuple of arguments or a dictionary of keyword arguments of one
    rank's forward (their values do not matter, meta tensors do); with it the model's code runs once
    on fake tensors, for the order of execution and the size of activations.

    Raises what the wrapper would raise for the model, the policy and the staging, and what the
    model's own code raises when it asks a fake tensor for its value.
    """
    for name, number in (("world_size", world_size), ("replicas", replicas)):
        if number < 1:
            raise ValueError(f"{name}={number}: give a number of at least 1")
    policy = ShardingPolicy.of(policy)
    precision = MixedPrecisionPolicy.of(mixed_precision)
    check_module(model)
    assignments = assign(model, policy)
    check_uses(assignments, world_size * replicas)
    transports = likely(wanted(policy.transport), world_size)
    made = plan_of(
        assignments,
        policy,
        precision,
        inplace,
        transports,
        world_size=world_size,
        replicas=replicas,
    )
    return made if example_inputs is None else traced(made, model, example_inputs)


def plan_of(
    assignments: list[Assignment],
    policy: ShardingPolicy,
    precision: MixedPrecisionPolicy,
    inplace: bool,
    transports: Sequence[str],
    *,
    world_size: int,
    replicas: int,
) -> Plan:
    """The plan of parameters that have their strategies, without what a trace would tell.

    It has the first of ``transports`` whose staging holds one kernel of every rotated weight; if
    none does, ``ValueError``.
    """
    parameters = tuple(_planned(each) for each in assignments)
    for transport in transports:
        default = INPLACE_STAGING_BYTES if inplace else _DEFAULTS[transport]
        limit = policy.staging_bytes or default
        whole = 1.0 if policy.staging_bytes else WHOLE_LAYERS
        try:
            needed = _staging_bytes(
                parameters, world_size, precision, limit, whole, transport, overlap=not inplace
            )
            break
        except ValueError:
            if transport == transports[-1]:
                raise
    return Plan(
        world_size=world_size,
        parameters=parameters,
        staging_bytes=needed,
        transport=transport,
        inplace=inplace,
        mixed_precision=precision,
        replicas=replicas,
    )


def check_given(
    plan: object, rings: Rings, policy: object, mixed_precision: object, inplace: bool
) -> None:
    """Raise for a plan that is none, is for another number of ranks, or has company."""
    if not isinstance(plan, Plan):
        raise TypeError(f"plan is a {type(plan).__name__}: give what rtp_wrap.plan() made")
    given = {"policy": policy, "mixed_precision": mixed_precision, "inplace": inplace or None}
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"give either plan or {name}, which is part of the plan")
    world_size, replicas = rings.length, rings.count
    if (plan.world_size, plan.replicas) != (world_size, replicas):
        raise ValueError(
            f"the plan was made for {_rings(plan.replicas)} of {plan.world_size} ranks, but there "
            f"{'is' if replicas == 1 else 'are'} {_rings(replicas)} of {world_size}: call "
            f"rtp_wrap.plan(model, world_size={world_size}, replicas={replicas}, ...)"
        )


def _rings(replicas: int) -> str:
    return "one ring" if replicas == 1 else f"{replicas} rings"


def follow(model: nn.Module, plan: Plan) -> list[Assignment]:
    """The model's parameters with what ``plan`` has for them, which must be those of the model."""
    assignments = {each.fqn: each for each in assign(model, ShardingPolicy())}
    for planned in plan.parameters:
        if planned.fqn not in assignments:
            raise ValueError(
                f"the plan is for another model: the model has no parameter {planned.fqn}"
            )
        assignment = assignments[planned.fqn]
        parameter, strategies = assignment.parameter, {u.fqn: u.strategy for u in planned.uses}
        theirs = (planned.shape, planned.dtype, planned.requires_grad, list(strategies))
        names = [use.fqn for use in assignment.uses]
        ours = (tuple(parameter.shape), parameter.dtype, parameter.requires_grad, names)
        if ours != theirs:
            raise ValueError(
                f"the plan is for another model: {planned.fqn} of shape {ours[0]}, {ours[1]}, "
                f"requires_grad={ours[2]}, used as {ours[3]}, but the plan has {theirs}"
            )
        for use in assignment.uses:
            strategy = strategies[use.fqn]
            if isinstance(strategy, Rotate) and rotation_dim(use.module, use.name) is None:
                raise ValueError(
                    f"the plan rotates {use.fqn}, but this {type(use.module).__name__} has no "
                    f"rotated form: make the plan from the model that is wrapped"
                )
        assignments[planned.fqn] = replace(
            assignment,
            home=planned.home,
            rule=planned.rule,
            uses=tuple(replace(u, strategy=strategies[u.fqn]) for u in assignment.uses),
        )
    known = {planned.fqn for planned in plan.parameters}
    for fqn in assignments:
        if fqn not in known:
            raise ValueError(f"the plan is for another model: the plan has no parameter {fqn}")
    return list(assignments.values())


def traced(plan: Plan, model: nn.Module, example_inputs: Any) -> Plan:
    """``plan`` with what one run of the model on fake tensors tells."""
    precision = plan.mixed_precision
    args, kwargs = _arguments(example_inputs)
    trace = capture(
        model,
        args,
        kwargs,
        before_module=lambda inputs: cast_inputs(inputs, precision),
        dtype_of=lambda module, dtype: precision_of(module, precision).compute_dtype(dtype),
    )
    return replace(
        plan,
        sites=sites_of(trace.graph),
        pairs=pairs_of(trace.graph, model),
        outside=outside_uses_of(trace.graph),
        opaque=tuple(f"{fqn} ({error})" for fqn, error in trace.opaque.items()),
        activation_bytes=trace.activation_bytes,
    )


def _arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, list | tuple):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def _planned(assignment: Assignment) -> PlannedParameter:
    parameter = assignment.parameter
    return PlannedParameter(
        uses=tuple(
            PlannedUse(
                fqn=use.fqn,
                kind=type(use.module).__name__,
                strategy=use.strategy,
                passes_gradient=not isinstance(use.module, nn.Embedding | nn.EmbeddingBag),
            )
            for use in assignment.uses
        ),
        shape=tuple(parameter.shape),
        dtype=parameter.dtype,
        requires_grad=parameter.requires_grad,
        home=assignment.home,
        rule=assignment.rule,
    )


def _staging_bytes(
    parameters: tuple[PlannedParameter, ...],
    world_size: int,
    precision: MixedPrecisionPolicy,
    limit: int,
    whole: float,
    transport: str,
    *,
    overlap: bool,
) -> int:
    """The limit, or less: what it takes so that of the rotated layers a part ``whole`` is not cut.

    Raises ``ValueError`` if a tile of one kernel does not fit.
    """
    sizes, kernels = [], []
    room = functools.partial(
        staging_for, world_size=world_size, transport=transport, overlap=overlap
    )
    for each in parameters:
        if isinstance(each.home, Rotate) and world_size > 1:
            itemsize = tile_itemsize(each.dtype, precision, transport)
            kernel = math.prod(each.shape[2:])
            needed = room(kernel * itemsize)
            kernels.append(needed)
            if needed > limit:
                raise ValueError(
                    f"{each.fqn} of shape {each.shape} is cut into tiles of no less than one "
                    f"kernel of {kernel} elements, which needs staging_bytes of at least {needed}; "
                    f"the policy has {limit}. Raise it, or Gather() this layer"
                )
            shard = math.prod(each.shard_shape(world_size)) * itemsize
            sizes.append(room(shard))
    if not sizes:
        return 0
    sizes.sort()
    enough = max(sizes[math.ceil(whole * len(sizes)) - 1], MIN_DEFAULT_STAGING_BYTES, *kernels)
    return min(limit, sizes[-1], enough)
