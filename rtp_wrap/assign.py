"""From a model and a policy to one strategy for every parameter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase

import torch
from torch import nn

from rtp_wrap.modules import rotation_dim
from rtp_wrap.names import own_name, own_names
from rtp_wrap.policy import Gather, Ignore, Match, Replicate, Rotate, ShardingPolicy, Strategy

#: A dimension of so many elements is shared by all ranks of most groups.
MANY = 64


@dataclass(frozen=True)
class Use:
    """One name of a parameter: the module that registers it and what that module does with it.

    ``rule`` says what chose the strategy, for people; ``ruled`` that it was one of the policy's.
    """

    module_fqn: str
    module: nn.Module
    name: str
    strategy: Strategy
    rule: str
    ruled: bool

    @property
    def fqn(self) -> str:
        return _join(self.module_fqn, self.name)


@dataclass(frozen=True)
class Assignment:
    """One parameter, all its uses (several when it is tied), and how it is kept at home.

    ``home`` is ``Rotate`` or ``Gather`` for a sharded parameter (both mean 1/N along ``dim``, which
    is a number here), and ``rule`` says what chose it.
    """

    parameter: nn.Parameter
    uses: tuple[Use, ...]
    home: Strategy
    rule: str

    @property
    def fqn(self) -> str:
        return self.uses[0].fqn


def assign(model: nn.Module, policy: ShardingPolicy) -> list[Assignment]:
    """One assignment per distinct parameter of ``model``, in registration order.

    Of a tied parameter, uses that a rule has chosen for decide, or else all of them: it is rotated
    if one of those is, else gathered if one is, and the first such use says along which dim.

    Raises ``ValueError`` for rules that choose nothing, that ask to rotate only what has no rotated
    form, that ignore some uses of a tied parameter but not all, or whose ``dim`` a parameter does
    not have, and for parameters of lazy modules, which have no shape yet.
    """
    rules = _Rules(model, policy)
    parameters: dict[int, nn.Parameter] = {}
    uses: dict[int, list[Use]] = {}
    for module_fqn, module in own_names(model):
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if isinstance(parameter, nn.parameter.UninitializedParameter):
                raise ValueError(
                    f"{_join(module_fqn, name)} has no shape yet: run the lazy module once before "
                    f"wrapping"
                )
            strategy, rule, ruled = rules.choose(module_fqn, module, name, parameter)
            parameters.setdefault(id(parameter), parameter)
            use = Use(module_fqn, module, name, strategy, rule, ruled)
            uses.setdefault(id(parameter), []).append(use)
    rules.check_all_used()
    return [_reconcile(parameter, uses[key]) for key, parameter in parameters.items()]


def _reconcile(parameter: nn.Parameter, uses: list[Use]) -> Assignment:
    """Settle what a tied parameter is at home, and what that leaves to each use."""
    ignored = [use for use in uses if isinstance(use.strategy, Ignore)]
    if ignored:
        if len(ignored) < len(uses):
            other = next(use for use in uses if not isinstance(use.strategy, Ignore))
            raise ValueError(
                f"{ignored[0].fqn} and {other.fqn} are one tied parameter, but a rule ignores only "
                f"the first: name both in the Ignore rule, or neither"
            )
        return Assignment(parameter, tuple(uses), Ignore(), uses[0].rule)
    # What a rule says about one of the uses holds for all of which none says anything.
    ruled = [use for use in uses if use.ruled] or uses
    sharded = [use for use in ruled if isinstance(use.strategy, Rotate)] or [
        use for use in ruled if isinstance(use.strategy, Gather)
    ]
    if not sharded:
        replicas = tuple(replace(use, strategy=Replicate()) for use in uses)
        return Assignment(parameter, replicas, Replicate(), ruled[0].rule)
    chosen, rule = sharded[0].strategy, sharded[0].rule
    assert isinstance(chosen, Rotate | Gather)
    dim = chosen.dim
    assert dim is not None
    if dim >= max(1, parameter.dim()):
        raise ValueError(
            f"{sharded[0].fqn} of shape {tuple(parameter.shape)} has no dim {dim} to shard: "
            f"let the rule {rule} name only parameters that have one"
        )
    settled = tuple(
        replace(use, strategy=Rotate(dim) if isinstance(use.strategy, Rotate) else Gather(dim))
        for use in uses
    )
    rotates = any(isinstance(use.strategy, Rotate) for use in settled)
    return Assignment(parameter, settled, Rotate(dim) if rotates else Gather(dim), rule)


def _gathered_dim(shape: torch.Size) -> int:
    """The first one that many ranks can share: not the 1 of a table of positions ``[1, T, C]``."""
    return next((dim for dim, length in enumerate(shape) if length >= MANY), 0)


class _Rules:
    """A policy's rules over one model, and the count of what each of them chose."""

    def __init__(self, model: nn.Module, policy: ShardingPolicy) -> None:
        self._policy = policy
        self._modules = dict(own_names(model, all_uses=True))
        self._names: dict[nn.Module, list[str]] = {}  # several for a module used in several places
        for fqn, module in self._modules.items():
            self._names.setdefault(module, []).append(fqn)
        self._fqns = list(self._modules) + [
            own_name(name) for name, _ in model.named_parameters(remove_duplicate=False)
        ]
        self._matched: dict[Match, list[str]] = {match: [] for match in policy.rules}
        self._rotated: set[Match] = set()

    def choose(
        self, module_fqn: str, module: nn.Module, name: str, parameter: nn.Parameter
    ) -> tuple[Strategy, str, bool]:
        """The strategy, what chose it, and whether that was one of the rules."""
        natural = rotation_dim(module, name)
        for match, strategy in self._policy.rules.items():
            if not any(self._matches(match, fqn, name) for fqn in self._names[module]):
                continue
            self._matched[match].append(_join(module_fqn, name))
            if isinstance(strategy, Rotate):
                if natural is None:
                    continue  # the rule is for others: a bias beside its weight, say
                self._rotated.add(match)
                if strategy.dim is None:
                    strategy = Rotate(natural)
            if isinstance(strategy, Gather) and parameter.dim() == 0:
                continue
            return strategy, _name(match), True
        if parameter.dim() == 0:
            return Replicate(), "scalar", False
        if parameter.numel() < self._policy.replicate_below:
            return Replicate(), f"below {self._policy.replicate_below} elements", False
        if natural is None:
            return Gather(_gathered_dim(parameter.shape)), "default", False
        return Rotate(natural), "default", False

    def _matches(self, match: Match, module_fqn: str, name: str) -> bool:
        if isinstance(match, str):
            match = own_name(match)
            if fnmatchcase(_join(module_fqn, name), match):
                return True
        for around in _enclosing(module_fqn):
            module = self._modules[around]
            if isinstance(match, str):
                if fnmatchcase(around, match):
                    return True
            elif isinstance(match, type):
                if isinstance(module, match):
                    return True
            elif match(around, module):
                return True
        return False

    def check_all_used(self) -> None:
        for match, matched in self._matched.items():
            if not matched:
                close = get_close_matches(match, self._fqns, 1) if isinstance(match, str) else []
                hint = f"; did you mean {close[0]!r}?" if close and close[0] != match else ""
                raise ValueError(
                    f"the policy rule {_name(match)} chose no parameter of this model (none "
                    f"matches, or earlier rules took them){hint}"
                )
            if isinstance(self._policy.rules[match], Rotate) and match not in self._rotated:
                raise ValueError(
                    f"the policy rule {_name(match)} asks to rotate {matched[0]}, which has no "
                    f"rotated form{self._why(matched[0])}: use Gather() there"
                )

    def _why(self, fqn: str) -> str:
        module = self._modules[fqn.rpartition(".")[0]]
        sparse = isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse
        return " with sparse=True" if sparse else ""


def _enclosing(module_fqn: str) -> Iterator[str]:
    """``a.b.c``, ``a.b``, ``a`` and the root."""
    while module_fqn:
        yield module_fqn
        module_fqn = module_fqn.rpartition(".")[0]
    yield ""


def _join(module_fqn: str, name: str) -> str:
    return f"{module_fqn}.{name}" if module_fqn else name


def _name(match: Match) -> str:
    return repr(match) if isinstance(match, str) else getattr(match, "__qualname__", repr(match))
