"""What becomes of every parameter: the user's rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import get_args

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy as FSDP2MixedPrecisionPolicy


@dataclass(frozen=True, slots=True)
class Rotate:
    """Keep 1/N; tiles rotate while the layer computes. For layers that have a rotated form.

    ``dim`` is the weight's dimension that is sharded, 0 or 1. Default: the one of the layer's
    output features (for embeddings: of their rows), so that each output element is one whole sum;
    the other one sums partial outputs and is right when there are few output features. In
    ``nn.Linear``, convolutions and attention that is dim 0, in transposed convolutions and Hugging
    Face's ``Conv1D`` dim 1.
    """

    dim: int | None = None

    def __post_init__(self) -> None:
        if self.dim not in (None, 0, 1):
            raise ValueError(
                f"Rotate(dim={self.dim!r}): a weight can be rotated along dim 0 or dim 1"
            )


@dataclass(frozen=True, slots=True)
class Gather:
    """Keep 1/N along ``dim``; the whole parameter exists only while its module computes.

    Gathered for the module's forward, again for its backward; its gradient is reduce-scattered.
    """

    dim: int = 0

    def __post_init__(self) -> None:
        if self.dim < 0:
            raise ValueError(f"Gather(dim={self.dim!r}): give the dimension counted from 0")


@dataclass(frozen=True, slots=True)
class Replicate:
    """Keep all of it on every rank; gradients are averaged, all of one forward together."""


@dataclass(frozen=True, slots=True)
class Ignore:
    """Leave the parameter as it is: not moved, not sharded, its gradient not averaged.

    It stays a plain tensor, so ``clip_grad_norm_`` and optimizers with ``fused=True`` or
    ``foreach=True``, which refuse a list that mixes plain tensors with DTensors, need it in a call
    and a parameter group of its own.
    """


Strategy = Rotate | Gather | Replicate | Ignore
#: A glob over fqns, a module type, or a predicate of (module fqn, module).
Match = str | type[nn.Module] | Callable[[str, nn.Module], bool]
Rules = Mapping[Match, Strategy]


def shard_dim(home: Strategy) -> int | None:
    """The dim along which a parameter is 1/N at home, ``None`` if it is whole there."""
    return home.dim if isinstance(home, Rotate | Gather) else None


@dataclass(frozen=True, kw_only=True)
class ShardingPolicy:
    """Rules and sizes; immutable.

    ``rules``
        maps what to match to a strategy; the first rule that matches a parameter wins. A glob
        (``"layers.*.mlp"``) is held against the parameter's own fqn and those of the modules
        around it, a type and a predicate against the modules around it: naming a module names all
        of its parameters. Fqns are the model's own, without ``_orig_mod`` of ``torch.compile``.
        ``Rotate`` takes those that have a rotated form (weights of linears, embeddings, attention
        and convolutions) and leaves the others, such as biases, to later rules or the default.
    ``replicate_below``
        in elements: without a rule, a smaller parameter is replicated. Larger ones are rotated
        where a rotated form exists, else gathered.
    ``staging_bytes``
        the memory for tiles in flight, in bytes per rank, all layers together; larger shards are
        cut to fit, and never more is taken than the largest can use. Default: 896 MiB where tiles
        are pulled from peers, 128 MiB where they go round a ring, or 16 MiB with ``inplace=True``;
        less, down to 224 MiB, where nine of ten layers need not be cut for that.
    ``transport``
        ``"peer"``: tiles are pulled out of the memory of the rank that has them, by copy engines
        between GPUs. ``"ring"``: they go from rank to rank, by the group's backend. ``"auto"``:
        ``"peer"`` if every rank of a ring has a GPU of its own on one host and these can read each
        other's memory, else ``"ring"``; the environment variable ``RTP_WRAP_TRANSPORT`` stands in
        for it.
    """

    rules: Rules = field(default_factory=dict)
    replicate_below: int = 16384
    staging_bytes: int | None = None
    transport: str = "auto"

    def __post_init__(self) -> None:
        if not isinstance(self.rules, Mapping):
            raise TypeError(
                f"ShardingPolicy(rules=...) takes a mapping, not {type(self.rules).__name__}"
            )
        for match, strategy in self.rules.items():
            if not isinstance(strategy, Strategy):
                hint = f"; write {strategy.__name__}()" if strategy in get_args(Strategy) else ""
                raise TypeError(
                    f"the rule for {match!r} is {strategy!r}, which is no strategy: use "
                    f"Rotate(dim=...), Gather(), Replicate() or Ignore(){hint}"
                )
            if isinstance(match, type) and not issubclass(match, nn.Module):
                raise TypeError(f"rule {match!r}: a type must be a subclass of nn.Module")
            if not isinstance(match, str | type) and not callable(match):
                raise TypeError(
                    f"rule {match!r}: match by fqn glob, nn.Module type or predicate(fqn, module)"
                )
        if self.replicate_below < 0:
            raise ValueError(f"replicate_below={self.replicate_below}: must be 0 or more elements")
        if self.staging_bytes is not None and self.staging_bytes < MIN_STAGING_BYTES:
            raise ValueError(
                f"staging_bytes={self.staging_bytes}: at least {MIN_STAGING_BYTES} bytes are needed"
            )
        check_transport("transport", self.transport)
        object.__setattr__(self, "rules", dict(self.rules))

    @classmethod
    def of(cls, policy: ShardingPolicy | Rules | None) -> ShardingPolicy:
        """The policy itself, one with these rules, or the default one."""
        if isinstance(policy, ShardingPolicy):
            return policy
        return cls() if policy is None else cls(rules=policy)


@dataclass(frozen=True, kw_only=True)
class MixedPrecisionPolicy:
    """The dtypes of computation and communication; those of FSDP2's policy of this name.

    Home shards, ``.grad`` and optimizer state keep the dtype that the parameters were given in;
    buffers keep theirs, and so do the weights of norms with running statistics. Parameters and
    gradients that are not floating-point are left alone.

    ``param_dtype``
        of tiles and gathered or replicated weights while a layer computes, hence of its matrix
        products. Default: the parameter's own.
    ``reduce_dtype``
        in which gradients are summed over the ranks. Default: the parameter's own dtype, so fp32
        for fp32 parameters (FSDP2's default is ``param_dtype``). Replicated 16-bit parameters are
        averaged in fp32 by default.
    ``output_dtype``
        to which floating-point outputs of the wrapped model are cast. Default: they are not.
    ``cast_forward_inputs``
        whether floating-point inputs of every module with managed parameters at or below it are
        cast to ``param_dtype``, as with ``fully_shard`` on each of them.
    """

    param_dtype: torch.dtype | None = None
    reduce_dtype: torch.dtype | None = None
    output_dtype: torch.dtype | None = None
    cast_forward_inputs: bool = True

    def __post_init__(self) -> None:
        for name in ("param_dtype", "reduce_dtype", "output_dtype"):
            dtype = getattr(self, name)
            if dtype is not None and not isinstance(dtype, torch.dtype):
                raise TypeError(f"{name}={dtype!r} is no torch.dtype")
            if dtype is not None and not dtype.is_floating_point:
                raise ValueError(f"{name}={dtype}: give a floating-point dtype")

    @classmethod
    def of(cls, policy: object) -> MixedPrecisionPolicy:
        """The policy itself, the same of FSDP2's class, or for ``None`` the default one."""
        if isinstance(policy, cls):
            return policy
        if policy is None:
            return cls()
        if isinstance(policy, FSDP2MixedPrecisionPolicy):
            return cls(**vars(policy))
        raise TypeError(
            f"mixed_precision={policy!r}: give a MixedPrecisionPolicy(param_dtype=...), from "
            f"rtp_wrap or torch.distributed.fsdp"
        )

    def compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which a parameter of ``dtype`` computes."""
        return (self.param_dtype or dtype) if dtype.is_floating_point else dtype

    def accumulator_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which gradients of a parameter of ``dtype`` are summed over the ranks."""
        return (self.reduce_dtype or dtype) if dtype.is_floating_point else dtype

    def average_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The same for a replicated parameter, whose sum is one collective: wide enough for it."""
        if self.reduce_dtype is None and dtype in (torch.float16, torch.bfloat16):
            return torch.float32
        return self.accumulator_dtype(dtype)


#: Four slots of 256 bytes: anything larger works, and anything useful is far larger.
MIN_STAGING_BYTES = 1024
#: What can be asked for.
TRANSPORTS = ("auto", "peer", "ring")


def check_transport(name: str, transport: str) -> None:
    """Raise ``ValueError`` for an unknown transport; ``name`` is where it was given."""
    if transport not in TRANSPORTS:
        raise ValueError(f"{name}={transport!r}: give one of {', '.join(map(repr, TRANSPORTS))}")
