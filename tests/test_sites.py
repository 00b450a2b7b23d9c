from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import fx, nn

from rtp_wrap.sites import outside_uses_of, pairs_of, sites_of
from rtp_wrap.trace import capture
from tests.test_trace import IDS, Gated


class Mlp(nn.Module):
    def __init__(self, between: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.up, self.side, self.down = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 6)
        self.between = between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.between(self, x))


def _pairs(between: Callable[..., torch.Tensor]) -> list[tuple[tuple[str, ...], str]]:
    model = Mlp(between)
    found = pairs_of(capture(model, (torch.zeros(3, 6),)).graph, model)
    return [(pair.first, pair.last) for pair in found]


def test_sites_say_what_they_read_and_whether_it_is_trained() -> None:
    sites = sites_of(capture(Gated(), (IDS,)).graph)
    assert [site.fqn for site in sites] == ["embed", *["norm", "gate", "up", "down"] * 2]
    first = {site.fqn: site for site in sites[:5]}
    assert first["gate"].reads == first["up"].reads != first["down"].reads
    assert first["gate"].reads != sites[6].reads  # another call, another tensor
    assert [site.trains_input for site in sites] == [False] + [True] * 8


def test_parameters_that_are_used_outside_of_their_module_are_named_once() -> None:
    assert outside_uses_of(capture(Gated(), (IDS,)).graph) == ("scale", "shift", "embed.weight")


def test_pairs_are_joined_by_pointwise_operations_alone() -> None:
    assert _pairs(lambda m, x: F.gelu(m.up(x))) == [(("up",), "down")]
    assert _pairs(lambda m, x: m.up(x)) == [(("up",), "down")]
    assert _pairs(lambda m, x: F.silu(m.up(x)) * m.side(x) + 1) == [(("up", "side"), "down")]
    assert _pairs(lambda m, x: m.up(x) * m.up(x + 1)) == [(("up", "up"), "down")]
    assert _pairs(lambda m, x: F.softmax(m.up(x), -1)) == []
    assert _pairs(lambda m, x: m.up(x).flip(0)) == []
    assert _pairs(lambda m, x: m.up(x) + m.up(x).sum(-1, keepdim=True)) == []
    assert _pairs(lambda m, x: m.up(x) * m.up(x[:1])) == []  # a tile of one is none of the other
    assert _pairs(lambda m, x: m.up(x) * F.pad(x, (0, 2))) == []  # another input
    assert _pairs(lambda m, x: m.up(x) * m.down.bias.sum()) == []  # a parameter


def test_the_hidden_activation_must_not_be_needed_elsewhere() -> None:
    class Leaks(Mlp):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            before = self.up(x)
            after = F.gelu(before)
            return self.down(after) + self.between(before, after).sum()

    for leak in (lambda before, after: before, lambda before, after: after):
        model = Leaks(leak)
        assert pairs_of(capture(model, (torch.zeros(3, 6),)).graph, model) == ()


def test_the_graph_of_a_pair_computes_what_lies_between() -> None:
    model = Gated()
    pair = pairs_of(capture(model, (IDS,)).graph, model)[0]
    assert (pair.first, pair.last) == (("gate", "up"), "down")
    between = fx.GraphModule(nn.Module(), pair.graph)
    gate, up = torch.randn(2, 3, 12)
    assert torch.equal(between(gate, up), F.silu(gate) * up)
