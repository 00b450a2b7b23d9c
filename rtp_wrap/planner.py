"""The plan: what becomes of every parameter of a model, and what that costs each rank.

Made without a process group, without memory for the model, and for any number of ranks. The wrapper
executes a plan: its own, or one that is given to it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any, get_args

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy as FSDP2MixedPrecisionPolicy

from rtp_wrap.assign import Assignment, assign
from rtp_wrap.casting import cast_inputs
from rtp_wrap.describe import describe
from rtp_wrap.modules import precision_of, rotation_dim
from rtp_wrap.policy import (
    Gather,
    MixedPrecisionPolicy,
    Replicate,
    Rotate,
    Rules,
    ShardingPolicy,
    Strategy,
    shard_dim,
)
from rtp_wrap.shard import local_shape
from rtp_wrap.sites import Pair, Site, outside_uses_of, pairs_of, sites_of
from rtp_wrap.trace import capture
from rtp_wrap.traffic import Network, Traffic
from rtp_wrap.transport import likely, wanted
from rtp_wrap.transport.room import staging_for, tile_itemsize
from rtp_wrap.verify import check_module, check_uses

#: Default staging of the ring, bytes per rank: two tiles of 64 MiB in forward, four of 32 MiB in
#: backward.
STAGING_BYTES = 128 << 20
#: Default where tiles are pulled: seven slots of 128 MiB, so that most layers need not be cut.
PEER_STAGING_BYTES = 896 << 20
#: Default with ``inplace=True``: two tiles of 8 MiB in forward, three of 5 in backward.
INPLACE_STAGING_BYTES = 16 << 20

_DEFAULTS = {"ring": STAGING_BYTES, "peer": PEER_STAGING_BYTES}

_STRATEGIES: dict[str, Any] = {each.__name__: each for each in get_args(Strategy)}


@dataclass(frozen=True, kw_only=True)
class PlannedUse:
    """One name of a parameter, and what the module that has it under this name does with it.

    ``kind`` is that module's class; ``passes_gradient`` is false of lookups, whose inputs are ids.
    """

    fqn: str
    kind: str
    strategy: Strategy
    passes_gradient: bool = True

    @property
    def module(self) -> str:
        return self.fqn.rpartition(".")[0]


@dataclass(frozen=True, kw_only=True)
class PlannedParameter:
    """One parameter, under all its names (several if it is tied).

    ``home`` is how it is kept: ``Rotate`` and ``Gather`` both mean 1/N along ``dim``. ``rule`` is
    what chose that.
    """

    uses: tuple[PlannedUse, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool
    home: Strategy
    rule: str

    @property
    def fqn(self) -> str:
        return self.uses[0].fqn

    @property
    def nbytes(self) -> int:
        """Of the whole parameter."""
        return math.prod(self.shape) * self.dtype.itemsize

    def shard_shape(self, world_size: int, rank: int = 0) -> tuple[int, ...]:
        """What ``rank`` keeps; rank 0 has the largest part."""
        return local_shape(self.shape, shard_dim(self.home), world_size, rank)

    def shard_bytes(self, world_size: int, rank: int = 0) -> int:
        return math.prod(self.shard_shape(world_size, rank)) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What wrapping does to a model on ``world_size`` ranks; immutable. All sizes are bytes.

    ``parameters`` are in registration order. A plan that was made with example inputs also has
    ``sites`` (execution order), ``pairs``, ``outside`` (parameters and buffers that are used
    outside of their module), ``opaque`` (sites that the trace could not look into, and why), and
    ``activation_bytes`` (what a rank saves for the backward of such inputs).
    """

    world_size: int
    parameters: tuple[PlannedParameter, ...]
    staging_bytes: int
    transport: str
    inplace: bool
    mixed_precision: MixedPrecisionPolicy
    sites: tuple[Site, ...] | None = None
    pairs: tuple[Pair, ...] = field(default=(), compare=False)
    outside: tuple[str, ...] = ()
    opaque: tuple[str, ...] = ()
    activation_bytes: int | None = None

    def parameter_bytes(self, rank: int = 0) -> int:
        """Home shards, and what is kept whole."""
        return sum(each.shard_bytes(self.world_size, rank) for each in self.parameters)

    def gradient_bytes(self, rank: int = 0) -> int:
        """Every ``.grad``."""
        trained = [each for each in self.parameters if each.requires_grad]
        return sum(each.shard_bytes(self.world_size, rank) for each in trained)

    def adam_bytes(self, rank: int = 0) -> int:
        """Both moments of ``torch.optim.Adam`` or ``AdamW``, in the parameters' dtypes."""
        return 2 * self.gradient_bytes(rank)

    @property
    def gathered_bytes(self) -> int:
        """Whole weights of the module that gathers most, while it computes."""
        sizes: dict[str, int] = {}
        for each in self.parameters:
            dtype = self.mixed_precision.compute_dtype(each.dtype)
            for use in each.uses:
                if isinstance(use.strategy, Gather):
                    whole = math.prod(each.shape) * dtype.itemsize
                    sizes[use.module] = sizes.get(use.module, 0) + whole
        return max(sizes.values(), default=0)

    def traffic(self, parameter: PlannedParameter, rank: int = 0) -> Traffic:
        """What ``rank`` sends for it in one forward and backward."""
        network = Network(
            self.world_size,
            rank,
            self.staging_bytes,
            self.transport,
            not self.inplace,
            self.mixed_precision,
        )
        total, shape, dtype = Traffic(), parameter.shape, parameter.dtype
        trained = parameter.requires_grad
        for use in parameter.uses:
            calls, trains_input = self._calls(use.module)
            dgrad = use.passes_gradient and trains_input
            strategy = use.strategy
            if isinstance(strategy, Rotate):
                assert strategy.dim is not None
                total += network.rotate(shape, strategy.dim, dtype, dgrad, trained) * calls
            elif isinstance(strategy, Gather):
                total += network.gather(shape, strategy.dim, dtype, dgrad, trained) * calls
        # Once a forward, whatever the number of uses is.
        if isinstance(parameter.home, Replicate):
            total += network.replicate(shape, dtype, trained)
        return total

    def total_traffic(self, rank: int = 0) -> Traffic:
        """What ``rank`` sends in one forward and backward."""
        return sum((self.traffic(each, rank) for each in self.parameters), Traffic())

    def _calls(self, module: str) -> tuple[int, bool]:
        """How often a module is called, and if its input is trained. Untraced: once, and yes."""
        if self.sites is None:
            return 1, True
        while module:
            calls = [site for site in self.sites if site.fqn == module]
            if calls:
                return len(calls), any(site.trains_input for site in calls)
            module = module.rpartition(".")[0]  # attention is one site with its projections
        return 1, True

    def to_json(self) -> str:
        """Everything but the pairs' graphs, which are there as text."""
        return json.dumps(_plain(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that ``to_json`` wrote; pairs are not read back."""
        data = json.loads(text)
        return cls(
            world_size=data["world_size"],
            parameters=tuple(_parameter_of(each) for each in data["parameters"]),
            staging_bytes=data["staging_bytes"],
            transport=data["transport"],
            inplace=data["inplace"],
            mixed_precision=MixedPrecisionPolicy(
                **{k: _dtype_of(v) for k, v in data["mixed_precision"].items()}
            ),
            sites=None if data["sites"] is None else tuple(Site(**each) for each in data["sites"]),
            outside=tuple(data["outside"]),
            opaque=tuple(data["opaque"]),
            activation_bytes=data["activation_bytes"],
        )

    def __str__(self) -> str:
        return describe(self)


def plan(
    model: nn.Module,
    *,
    world_size: int,
    policy: ShardingPolicy | Rules | None = None,
    mixed_precision: MixedPrecisionPolicy | FSDP2MixedPrecisionPolicy | None = None,
    inplace: bool = False,
    example_inputs: Any = None,
) -> Plan:
    """What ``RotatedTensorParallel(model, ...)`` will do on ``world_size`` ranks.

    Needs no process group, and no memory for the model: build it on the meta device.
    ``example_inputs`` is a tensor, a tuple of arguments or a dictionary of keyword arguments of one
    rank's forward (their values do not matter, meta tensors do); with it the model's code runs once
    on fake tensors, for the order of execution and the size of activations.

    Raises what the wrapper would raise for the model, the policy and the staging, and what the
    model's own code raises when it asks a fake tensor for its value.
    """
    if world_size < 1:
        raise ValueError(f"world_size={world_size}: give a number of ranks of at least 1")
    policy = ShardingPolicy.of(policy)
    precision = MixedPrecisionPolicy.of(mixed_precision)
    check_module(model)
    assignments = assign(model, policy)
    check_uses(assignments, world_size)
    transports = likely(wanted(policy.transport), world_size)
    made = plan_of(assignments, world_size, policy, precision, inplace, transports)
    return made if example_inputs is None else traced(made, model, example_inputs)


def plan_of(
    assignments: list[Assignment],
    world_size: int,
    policy: ShardingPolicy,
    precision: MixedPrecisionPolicy,
    inplace: bool,
    transports: Sequence[str],
) -> Plan:
    """The plan of parameters that have their strategies, without what a trace would tell.

    It has the first of ``transports`` whose staging holds one kernel of every rotated weight; if
    none does, ``ValueError``.
    """
    parameters = tuple(_planned(each) for each in assignments)
    for transport in transports:
        default = INPLACE_STAGING_BYTES if inplace else _DEFAULTS[transport]
        limit = policy.staging_bytes or default
        try:
            needed = _staging_bytes(parameters, world_size, precision, limit, transport)
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
    )


def check_given(
    plan: object, world_size: int, policy: object, mixed_precision: object, inplace: bool
) -> None:
    """Raise for a plan that is none, is for another number of ranks, or has company."""
    if not isinstance(plan, Plan):
        raise TypeError(f"plan is a {type(plan).__name__}: give what rtp_wrap.plan() made")
    given = {"policy": policy, "mixed_precision": mixed_precision, "inplace": inplace or None}
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"give either plan or {name}, which is part of the plan")
    if plan.world_size != world_size:
        raise ValueError(
            f"the plan was made for {plan.world_size} ranks, but the group has {world_size}: call "
            f"rtp_wrap.plan(model, world_size={world_size}, ...)"
        )


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
    transport: str,
) -> int:
    """The limit, or what the largest rotated layer can use if that is less.

    Raises ``ValueError`` if a tile of one kernel does not fit.
    """
    largest = 0
    for each in parameters:
        if isinstance(each.home, Rotate) and world_size > 1:
            itemsize = tile_itemsize(each.dtype, precision, transport)
            kernel = math.prod(each.shape[2:])
            needed = staging_for(kernel * itemsize, world_size, transport)
            if needed > limit:
                raise ValueError(
                    f"{each.fqn} of shape {each.shape} is cut into tiles of no less than one "
                    f"kernel of {kernel} elements, which needs staging_bytes of at least {needed}; "
                    f"the policy has {limit}. Raise it, or Gather() this layer"
                )
            largest = max(largest, math.prod(each.shard_shape(world_size)) * itemsize)
    return min(limit, staging_for(largest, world_size, transport)) if largest else 0


def _plain(value: Any) -> Any:
    """``value`` in what JSON has."""
    if isinstance(value, Strategy):
        return {"strategy": type(value).__name__, **asdict(value)}
    if isinstance(value, Pair):
        return {"first": value.first, "last": value.last, "graph": str(value.graph)}
    if is_dataclass(value):
        return {each.name: _plain(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, torch.dtype) else value


def _parameter_of(data: dict[str, Any]) -> PlannedParameter:
    uses = tuple(
        PlannedUse(**{**use, "strategy": _strategy_of(use["strategy"])}) for use in data["uses"]
    )
    return PlannedParameter(
        **{
            **data,
            "uses": uses,
            "shape": tuple(data["shape"]),
            "dtype": _dtype_of(data["dtype"]),
            "home": _strategy_of(data["home"]),
        }
    )


def _strategy_of(data: dict[str, Any]) -> Strategy:
    options = {key: value for key, value in data.items() if key != "strategy"}
    strategy: Strategy = _STRATEGIES[data["strategy"]](**options)
    return strategy


def _dtype_of(value: Any) -> Any:
    """The dtype that is written as ``torch.bfloat16``; anything else as it is."""
    if isinstance(value, str) and value.startswith("torch."):
        return getattr(torch, value.removeprefix("torch."))
    return value
