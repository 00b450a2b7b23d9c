"""The plan: what becomes of every parameter of a model, and what that costs each rank."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, get_args

import torch

from rtp_wrap.describe import describe
from rtp_wrap.policy import (
    Gather,
    MixedPrecisionPolicy,
    Replicate,
    Rotate,
    Strategy,
    shard_dim,
)
from rtp_wrap.shard import local_shape
from rtp_wrap.sites import Pair, Site
from rtp_wrap.traffic import Network, Traffic

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

    These are the ranks of one ring. Of such rings there are ``replicas``, with the same shards.
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
    replicas: int = 1
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
            world_size=self.world_size,
            rank=rank,
            staging_bytes=self.staging_bytes,
            transport=self.transport,
            overlap=not self.inplace,
            precision=self.mixed_precision,
            replicas=self.replicas,
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
            replicas=data.get("replicas", 1),  # older ones have one ring
            sites=None if data["sites"] is None else tuple(Site(**each) for each in data["sites"]),
            outside=tuple(data["outside"]),
            opaque=tuple(data["opaque"]),
            activation_bytes=data["activation_bytes"],
        )

    def __str__(self) -> str:
        return describe(self)


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
