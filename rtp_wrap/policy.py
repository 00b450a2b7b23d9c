"""What becomes of every parameter: the user's rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import nn


@dataclass(frozen=True, slots=True)
class Rotate:
    """Keep 1/N; tiles rotate while the layer computes. For layers that have a rotated form.

    ``dim`` is the weight's dimension that is sharded: 0 (default) gives each rank output
    features, 1 input features (sums partial outputs: right when there are few output features).
    """

    dim: int = 0

    def __post_init__(self) -> None:
        if self.dim not in (0, 1):
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
    """Keep all of it on every rank; gradients are averaged, one collective per forward."""


@dataclass(frozen=True, slots=True)
class Ignore:
    """Leave the parameter as it is: not moved, not sharded, its gradient not averaged.

    It stays a plain tensor, so ``clip_grad_norm_`` and fused optimizers, which refuse a list
    that mixes plain tensors with DTensors, need it in a call and a parameter group of its own.
    """


Strategy = Rotate | Gather | Replicate | Ignore
#: A glob over fqns, a module type, or a predicate of (module fqn, module).
Match = str | type[nn.Module] | Callable[[str, nn.Module], bool]
Rules = Mapping[Match, Strategy]

_STRATEGIES = (Rotate, Gather, Replicate, Ignore)


@dataclass(frozen=True, kw_only=True)
class ShardingPolicy:
    """Rules and sizes; immutable.

    ``rules``
        maps what to match to a strategy; the first rule that matches a parameter wins. A glob
        (``"layers.*.mlp"``) is held against the parameter's own fqn and those of the modules
        around it, a type and a predicate against the modules around it: naming a module names all
        of its parameters. ``Rotate`` takes those that have a rotated form (today the weight of
        ``nn.Linear``) and leaves the others, such as biases, to later rules or the default.
    ``replicate_below``
        in elements: without a rule, a smaller parameter is replicated. Larger ones are rotated
        where a rotated form exists, else gathered.
    ``staging_bytes``
        the memory for tiles in flight, in bytes per rank, all layers together; larger shards are
        cut to fit. Default: 128 MiB, or 16 MiB with ``inplace=True``; never more than the largest
        rotated layer can use.
    """

    rules: Rules = field(default_factory=dict)
    replicate_below: int = 16384
    staging_bytes: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.rules, Mapping):
            raise TypeError(
                f"ShardingPolicy(rules=...) takes a mapping, not {type(self.rules).__name__}"
            )
        for match, strategy in self.rules.items():
            if not isinstance(strategy, _STRATEGIES):
                hint = f"; write {strategy.__name__}()" if strategy in _STRATEGIES else ""
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
        object.__setattr__(self, "rules", dict(self.rules))

    @classmethod
    def of(cls, policy: ShardingPolicy | Rules | None) -> ShardingPolicy:
        """The policy itself, one with these rules, or the default one."""
        if isinstance(policy, ShardingPolicy):
            return policy
        return cls() if policy is None else cls(rules=policy)


#: Four slots of 256 bytes: anything larger works, and anything useful is far larger.
MIN_STAGING_BYTES = 1024
