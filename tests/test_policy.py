"""Policies: values that cannot be wrong, and say so when they are."""

from __future__ import annotations

import copy
import pickle
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from torch import nn

from rtp_wrap import Gather, Ignore, Replicate, Rotate, ShardingPolicy
from rtp_wrap.policy import MIN_STAGING_BYTES


def _is_head(fqn: str, module: nn.Module) -> bool:
    return fqn == "head"


RULES = {"layers.*": Rotate(dim=1), nn.Embedding: Gather(), _is_head: Replicate(), "x": Ignore()}
POLICY = ShardingPolicy(rules=RULES, replicate_below=7, staging_bytes=4096)


def test_the_default_has_no_rules() -> None:
    policy = ShardingPolicy()
    assert policy.rules == {}
    assert policy.replicate_below == 16384
    assert policy.staging_bytes is None
    assert Rotate() == Rotate(dim=None)  # that of the layer's output features
    assert Gather() == Gather(dim=0)


def test_a_policy_comes_from_rules_from_nothing_or_from_itself() -> None:
    assert ShardingPolicy.of(POLICY) is POLICY
    assert ShardingPolicy.of(None) == ShardingPolicy()
    assert ShardingPolicy.of(RULES) == ShardingPolicy(rules=RULES)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, copy.copy, lambda p: pickle.loads(pickle.dumps(p))]
)
def test_copies_and_pickles_are_equal(duplicate: Any) -> None:
    assert duplicate(POLICY) == POLICY
    assert list(duplicate(POLICY).rules) == list(POLICY.rules)  # the order decides
    for strategy in RULES.values():
        assert duplicate(strategy) == strategy


def test_a_policy_does_not_change() -> None:
    rules: dict[Any, Any] = {"a": Gather()}
    policy = ShardingPolicy(rules=rules)
    rules["b"] = Ignore()
    assert list(policy.rules) == ["a"]
    with pytest.raises(FrozenInstanceError):
        policy.replicate_below = 3  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        Rotate().dim = 1  # type: ignore[misc]


def test_options_are_named() -> None:
    with pytest.raises(TypeError, match="positional"):
        ShardingPolicy({})  # type: ignore[misc]


@pytest.mark.parametrize("dim", [-1, 2, "0"])
def test_a_weight_rotates_along_dim_0_or_1(dim: Any) -> None:
    with pytest.raises(ValueError, match=rf"Rotate\(dim={dim!r}\).* dim 0 or dim 1"):
        Rotate(dim=dim)


def test_a_gathered_dim_counts_from_0() -> None:
    assert Gather(dim=3).dim == 3
    with pytest.raises(ValueError, match=r"Gather\(dim=-1\).* counted from 0"):
        Gather(dim=-1)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rules": [("a", Gather())]}, TypeError, r"takes a mapping, not list"),
        ({"rules": {"a.b": "rotate"}}, TypeError, r"rule for 'a.b' is 'rotate'.*use Rotate\(dim"),
        ({"rules": {"a": Gather}}, TypeError, r"rule for 'a' is .*Gather.*; write Gather\(\)$"),
        ({"rules": {"a": Ignore}}, TypeError, r"; write Ignore\(\)$"),
        ({"rules": {int: Gather()}}, TypeError, r"'int'.* subclass of nn.Module"),
        ({"rules": {3: Gather()}}, TypeError, r"rule 3: match by fqn glob, nn.Module type or pred"),
        ({"rules": {None: Gather()}}, TypeError, r"rule None: match by"),
        ({"replicate_below": -5}, ValueError, r"replicate_below=-5: must be 0 or more elements"),
        (
            {"staging_bytes": MIN_STAGING_BYTES - 1},
            ValueError,
            rf"staging_bytes={MIN_STAGING_BYTES - 1}: at least {MIN_STAGING_BYTES} bytes",
        ),
        ({"staging_bytes": 0}, ValueError, r"staging_bytes=0: at least"),
    ],
)
def test_errors_name_the_rule_the_value_and_the_remedy(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ShardingPolicy(**options)


def test_the_limits_are_allowed() -> None:
    policy = ShardingPolicy(replicate_below=0, staging_bytes=MIN_STAGING_BYTES)
    assert (policy.replicate_below, policy.staging_bytes) == (0, MIN_STAGING_BYTES)
