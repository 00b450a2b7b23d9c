from __future__ import annotations

from collections import OrderedDict, defaultdict
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from rtp_wrap.casting import cast_floats

BF16 = torch.bfloat16


class Pair(NamedTuple):
    left: Any
    right: Any


@dataclass
class Output:
    logits: torch.Tensor
    ids: torch.Tensor
    made: list[int] = field(default_factory=list, init=False)


@dataclass
class Mapping(OrderedDict[str, Any]):
    """Like an output of Hugging Face: a dictionary whose entries are its fields."""

    logits: Any = None
    cache: Any = None

    def __post_init__(self) -> None:
        for name in ("logits", "cache"):
            self[name] = getattr(self, name)


def test_floating_point_tensors_are_cast_wherever_they_are() -> None:
    x, ids = torch.ones(2), torch.arange(2)
    assert cast_floats(x, BF16).dtype == BF16
    assert cast_floats(ids, BF16) is ids
    assert cast_floats([x, [ids]], BF16)[0].dtype == BF16
    assert cast_floats({"x": (x, 3)}, BF16)["x"][0].dtype == BF16
    assert cast_floats(Pair(x, ids), BF16).left.dtype == BF16
    assert isinstance(cast_floats(Pair(x, ids), BF16), Pair)
    output = cast_floats(Output(x, ids), BF16)
    assert (output.logits.dtype, output.ids) == (BF16, ids)
    mapping = cast_floats(Mapping(logits=x, cache="kept"), BF16)
    assert isinstance(mapping, Mapping)
    assert mapping.logits.dtype == mapping["logits"].dtype == BF16
    default = cast_floats(defaultdict(list, x=x), BF16)
    assert default["new"] == []
    assert default["x"].dtype == BF16
    packed = cast_floats(pack_sequence([x, x[:1]]), BF16)
    assert isinstance(packed, PackedSequence)
    assert packed.data.dtype == BF16


def test_what_has_nothing_to_cast_is_the_same_object() -> None:
    x = torch.ones(2)
    values: list[Any] = [
        x,
        [x],
        (x, {"ids": torch.arange(2)}),
        Pair(1, x),
        Output(x, x),
        Mapping(logits=x),
        None,
        "text",
        Output,
    ]
    for value in values:
        assert cast_floats(value, torch.float32) is value


def test_a_tensor_that_is_there_twice_is_cast_once() -> None:
    x = torch.ones(2)
    (query, key), options = cast_floats(((x, x), {"value": x}), BF16)
    assert query is key is options["value"]


def test_a_cast_is_part_of_the_graph() -> None:
    x = torch.ones(2, requires_grad=True)
    cast_floats({"x": x}, torch.float64)["x"].sum().backward()
    assert x.grad is not None
