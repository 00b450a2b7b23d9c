"""Plans: one strategy for every parameter, chosen by the first rule that matches. No ranks."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import parametrizations

from rtp_wrap import Gather, Ignore, Replicate, Rotate, ShardingPolicy
from rtp_wrap.assign import Assignment, assign
from rtp_wrap.policy import Rules
from tests.ranks import LAUNCHED


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8, bias=False)


class Model(nn.Module):
    def __init__(self, tie: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.layers = nn.ModuleList([Block(), Block()])
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.head = nn.Linear(8, 10)
        if tie:
            self.head.weight = self.embed.weight


def _plans(model: nn.Module, rules: Rules | None = None, **sizes: int) -> list[Assignment]:
    sizes.setdefault("replicate_below", 0)
    return assign(model, ShardingPolicy(rules=rules or {}, **sizes))


def _homes(model: nn.Module, rules: Rules | None = None, **sizes: int) -> dict[str, Any]:
    return {plan.fqn: plan.home for plan in _plans(model, rules, **sizes)}


@pytest.mark.skipif(LAUNCHED, reason="launched ranks may have joined a group for another test")
def test_no_process_group_is_needed() -> None:
    assert not dist.is_initialized()
    assert _plans(Model())


def test_without_rules_what_can_rotates_and_the_rest_is_gathered() -> None:
    model = Model()
    homes = _homes(model)
    assert list(homes) == [name for name, _ in model.named_parameters()]
    assert {fqn for fqn, home in homes.items() if home == Rotate(0)} == {
        "embed.weight",
        "layers.0.up.weight",
        "layers.0.down.weight",
        "layers.1.up.weight",
        "layers.1.down.weight",
        "head.weight",
    }
    assert homes.pop("scale") == Replicate()  # a scalar has nothing to shard
    assert {type(home) for home in homes.values()} == {Rotate, Gather}


def test_small_parameters_are_replicated_without_a_rule() -> None:
    homes = _homes(Model(), replicate_below=96)
    assert homes["layers.0.up.weight"] == Rotate(0)  # 96 elements
    assert homes["embed.weight"] == homes["head.weight"] == Replicate()  # 80
    assert _homes(Model(), {"head.weight": Rotate(1)}, replicate_below=96)["head.weight"] == Rotate(
        1
    )
    assert set(_homes(Model(), replicate_below=10**6).values()) == {Replicate()}


def test_the_first_rule_that_matches_wins() -> None:
    rules = {"layers.1.*": Gather(), "head": Replicate(), nn.Linear: Rotate(1)}
    homes = _homes(Model(), rules)
    assert homes["layers.0.up.weight"] == Rotate(1)
    assert homes["layers.1.up.weight"] == Gather()
    assert homes["head.weight"] == Replicate()


@pytest.mark.parametrize(
    ("match", "chosen"),
    [
        ("head.weight", {"head.weight"}),
        ("head", {"head.weight", "head.bias"}),
        ("layers.?.down", {"layers.0.down.weight", "layers.1.down.weight"}),
        ("*.up.bias", {"layers.0.up.bias", "layers.1.up.bias"}),
        ("layers.[01].norm.bias", {"layers.0.norm.bias", "layers.1.norm.bias"}),
        (nn.Embedding, {"embed.weight"}),
        (lambda fqn, module: isinstance(module, nn.Linear) and module.bias is None,
         {"layers.0.down.weight", "layers.1.down.weight"}),
        (lambda fqn, module: fqn == "head", {"head.weight", "head.bias"}),
    ],
    ids=["fqn", "module", "?", "*", "[]", "type", "predicate", "predicate of the fqn"],
)  # fmt: skip
def test_rules_match_by_fqn_type_or_predicate(match: Any, chosen: set[str]) -> None:
    homes = _homes(Model(), {match: Ignore()})
    assert {fqn for fqn, home in homes.items() if home == Ignore()} == chosen


def test_naming_a_module_names_everything_below_it() -> None:
    everything = {name for name, _ in Model().named_parameters()}
    layers = {name for name in everything if name.startswith("layers.")}
    for match, chosen in (
        ("layers", layers),
        (nn.ModuleList, layers),
        (Block, layers),
        (Model, everything),
        ("", everything),
        ("*", everything),
        (lambda fqn, module: fqn == "layers", layers),
    ):
        homes = _homes(Model(), {match: Ignore()})
        assert {fqn for fqn, home in homes.items() if home == Ignore()} == chosen


def test_a_fqn_is_not_a_prefix() -> None:
    model = nn.Sequential(OrderedDict(head=nn.Linear(2, 2), head2=nn.Linear(2, 2)))
    assert _homes(model, {"head": Ignore()})["head2.weight"] == Rotate(0)


def test_rotate_leaves_what_has_no_rotated_form_to_the_default() -> None:
    for below, bias in ((0, Gather()), (100, Replicate())):
        homes = _homes(Model(), {nn.Linear: Rotate(1)}, replicate_below=below)
        assert homes["head.weight"] == Rotate(1)
        assert homes["head.bias"] == bias
    # ... of the whole model, if that is named: what rotates is what can.
    homes = _homes(Model(), {"*": Rotate(1)})
    assert homes["head.weight"] == Rotate(1)
    assert homes["embed.weight"] == Rotate(1)
    assert homes["layers.0.norm.weight"] == Gather(0)
    assert homes["scale"] == Replicate()


def test_rotate_leaves_what_has_no_rotated_form_to_later_rules() -> None:
    homes = _homes(Model(), {nn.Linear: Rotate(1), "*.bias": Ignore()})
    assert homes["head.weight"] == Rotate(1)
    assert homes["head.bias"] == Ignore()


def test_a_scalar_cannot_be_gathered_and_is_replicated() -> None:
    assert _homes(Model(), {"*": Gather()})["scale"] == Replicate()


class OwnForward(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) + self.weight.sum()


class SameForward(nn.Linear):
    pass


def test_a_dimension_that_most_ranks_would_have_nothing_of_is_not_sharded() -> None:
    """Of positions ``[1, T, C]`` rank 0 would have everything."""
    for shape, dim in {(1, 300, 100): 1, (3, 10, 600): 2, (64, 300): 0, (150, 2, 90): 0}.items():
        table = nn.Module()
        table.register_parameter("positions", nn.Parameter(torch.zeros(shape)))
        assert _homes(table)["positions"] == Gather(dim)


def _patched() -> nn.Linear:
    linear = nn.Linear(3, 4)
    linear.forward = lambda input: input  # type: ignore[method-assign]
    return linear


def test_only_a_linear_layer_that_computes_like_one_is_rotated() -> None:
    """Another forward may use the weight in any way; gathered, it is right in all of them."""
    assert _homes(SameForward(3, 4))["weight"] == Rotate(0)
    assert _homes(nn.Linear(3, 4).bfloat16())["weight"] == Rotate(0)
    assert _homes(OwnForward(3, 4))["weight"] == Gather()
    assert _homes(_patched())["weight"] == Gather()
    assert _homes(nn.Bilinear(2, 3, 4))["weight"] == Gather()
    normed = parametrizations.weight_norm(nn.Linear(3, 4))
    assert set(_homes(normed).values()) == {Gather()}
    empty = nn.Linear(4, 1, bias=False)
    empty.weight = nn.Parameter(torch.empty(0, 4))
    assert _homes(empty)["weight"] == Gather()


def test_a_tied_parameter_has_one_home_and_a_use_for_every_name() -> None:
    (tied,) = (plan for plan in _plans(Model(tie=True)) if len(plan.uses) > 1)
    assert tied.fqn == "embed.weight"
    assert [(use.fqn, use.strategy) for use in tied.uses] == [
        ("embed.weight", Rotate(0)),
        ("head.weight", Rotate(0)),
    ]
    assert tied.home == Rotate(0)


@pytest.mark.parametrize(
    ("rules", "home", "uses", "rule"),
    [
        ({"head.weight": Rotate(1)}, Rotate(1), [Rotate(1)] * 2, "'head.weight'"),
        ({"embed": Rotate(1)}, Rotate(1), [Rotate(1)] * 2, "'embed'"),
        ({"embed": Rotate(1), "head": Gather()}, Rotate(1), [Rotate(1), Gather(1)], "'embed'"),
        ({"embed": Gather(), "head": Rotate(1)}, Rotate(1), [Gather(1), Rotate(1)], "'head'"),
        ({"embed": Gather(1)}, Rotate(1), [Gather(1), Rotate(1)], "'embed'"),
        ({"head": Replicate()}, Replicate(), [Replicate()] * 2, "'head'"),
        ({"head.w*": Gather(1), "embed": Gather()}, Gather(0), [Gather(0)] * 2, "'embed'"),
        ({"head.w*": Gather(1), "embed": Replicate()}, Gather(1), [Gather(1)] * 2, "'head.w*'"),
        ({"embed": Replicate(), "head": Rotate(1)}, Rotate(1), [Gather(1), Rotate(1)], "'head'"),
        ({"head": Replicate(), "embed": Replicate()}, Replicate(), [Replicate()] * 2, "'embed'"),
        ({"head": Ignore(), "embed": Ignore()}, Ignore(), [Ignore()] * 2, "'embed'"),
    ],
)  # fmt: skip
def test_uses_of_a_tied_parameter_are_settled(
    rules: Rules, home: Any, uses: list[Any], rule: str
) -> None:
    (tied,) = (plan for plan in _plans(Model(tie=True), rules) if len(plan.uses) > 1)
    assert tied.home == home
    assert [use.strategy for use in tied.uses] == uses
    assert tied.rule == rule  # that of the use which decided


def test_half_ignored_ties_are_refused() -> None:
    for ignored, other in (("embed", "head"), ("head", "embed")):
        message = (
            rf"{ignored}.weight and {other}.weight are one tied.*only the first: name both in the "
            rf"Ignore rule, or neither"
        )
        with pytest.raises(ValueError, match=message):
            _plans(Model(tie=True), {ignored: Ignore()})


def test_a_module_in_two_places_is_matched_by_both_names() -> None:
    shared = nn.Linear(3, 3, bias=False)
    model = nn.ModuleDict({"a": shared, "b": shared})
    for match in ("a", "b", "b.weight"):
        (plan,) = _plans(model, {match: Rotate(1)})
        assert plan.home == Rotate(1)
        assert [use.fqn for use in plan.uses] == ["a.weight"]


def _matches_nothing(fqn: str, module: nn.Module) -> bool:
    return False


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"heed": Rotate()}, r"rule 'heed' chose no parameter .*did you mean 'head'\?$"),
        ({"layer.0.up": Rotate()}, r"did you mean 'layers.0.up'\?$"),
        ({"zzz": Gather()}, r"'zzz' chose no parameter of this model \(none matches.*\)$"),
        ({nn.Conv2d: Gather()}, r"rule Conv2d chose no parameter.*\)$"),
        ({_matches_nothing: Gather()}, r"rule _matches_nothing chose no parameter of this model"),
        ({"head": Gather(), "head.bias": Ignore()}, r"'head.bias' chose no.*took them\)$"),
        ({nn.LayerNorm: Rotate()}, r"LayerNorm asks to rotate layers.0.norm.weight, which has no"),
        ({"head.bias": Rotate(1)}, r"'head.bias' asks to rotate head.bias"),
        ({"head": Gather(2)}, r"head.weight of shape \(10, 8\) has no dim 2 .*'head' name only"),
        ({nn.LayerNorm: Gather(1)}, r"norm.weight of shape \(8,\) has no dim 1 .*rule LayerNorm"),
    ],
)  # fmt: skip
def test_rules_that_cannot_be_are_refused_with_a_remedy(rules: Rules, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _plans(Model(), rules)


def test_rotating_a_sparse_embedding_is_refused_with_the_reason() -> None:
    model = nn.Sequential(nn.Embedding(10, 8, sparse=True), nn.EmbeddingBag(10, 8, sparse=True))
    for layer in ("0", "1"):
        message = (
            rf"'{layer}' asks to rotate {layer}.weight, which has no rotated form with "
            rf"sparse=True: use Gather\(\) there"
        )
        with pytest.raises(ValueError, match=message):
            _plans(model, {layer: Rotate()})
    assert set(_homes(model).values()) == {Gather()}


def test_parameters_without_a_shape_are_refused() -> None:
    lazy = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(ValueError, match=r"0.weight has no shape yet: run the lazy module once"):
        _plans(lazy)


def test_the_plan_names_what_chose() -> None:
    rules = {"head.weight": Rotate(), nn.Embedding: Gather(), _is_up: Gather()}
    plans = {plan.fqn: plan.rule for plan in _plans(Model(), rules, replicate_below=20)}
    assert plans["head.weight"] == "'head.weight'"
    assert plans["embed.weight"] == "Embedding"
    assert plans["layers.0.up.weight"] == "_is_up"
    assert plans["layers.0.down.weight"] == "default"
    assert plans["layers.0.norm.bias"] == "below 20 elements"
    assert plans["scale"] == "scalar"


def _is_up(fqn: str, module: nn.Module) -> bool:
    return fqn.endswith(".up")


def test_planning_changes_nothing() -> None:
    model = Model(tie=True)
    before = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    types = [type(module) for module in model.modules()]
    _plans(model, {"head": Rotate(1)})
    assert before == {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    assert types == [type(module) for module in model.modules()]


def test_a_model_without_parameters_has_an_empty_plan() -> None:
    assert _plans(nn.ReLU()) == []


def test_names_are_the_models_own_where_blocks_were_compiled() -> None:
    def homes(match: Any, compiled: bool) -> dict[str, Any]:
        model = Model()
        if compiled:
            for index, layer in enumerate(model.layers):
                model.layers[index] = torch.compile(layer)  # type: ignore[assignment]
        return _homes(model, {match: Ignore()})

    for match in (
        "layers.*.up",
        "layers.1.down.weight",
        "layers.0",
        Block,
        lambda fqn, module: fqn == "layers.0" and isinstance(module, Block),
    ):
        assert homes(match, True) == homes(match, False)
    # As torch calls them, in named_parameters().
    assert homes("layers.*._orig_mod.up", True) == homes("layers.*.up", False)
    with pytest.raises(ValueError, match=r"did you mean 'layers.0.up'"):
        homes("layers.0.upp", True)
