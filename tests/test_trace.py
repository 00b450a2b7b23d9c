from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from rtp_wrap.trace import capture, is_site


class Gated(nn.Module):
    """A gated MLP, a residual stream, a tied weight, and a module that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm(8)
        self.gate, self.up = nn.Linear(8, 12), nn.Linear(8, 12)
        self.down = nn.Linear(12, 8)
        self.scale = nn.Parameter(torch.ones(8))
        self.register_buffer("shift", torch.zeros(8))

    def forward(self, ids: torch.Tensor, *rest: Any, depth: int = 2) -> torch.Tensor:
        assert ids.dim() == 2
        x = self.embed(ids)
        for _ in range(depth):
            y = self.norm(x)
            x = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return F.linear(x * self.scale + self.shift, self.embed.weight)


IDS = torch.zeros(3, 5, dtype=torch.long)


def _targets(graph: fx.Graph, op: str) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op == op]


def test_sites_are_in_execution_order_and_control_flow_is_followed() -> None:
    graph = capture(Gated(), (IDS, "more")).graph
    block = ["norm", "gate", "up", "down"]
    assert _targets(graph, "call_module") == ["embed", *block, *block]
    assert _targets(graph, "get_attr") == ["scale", "shift", "embed.weight"]
    once = capture(Gated(), (IDS,), {"depth": 1}).graph
    assert _targets(once, "call_module") == ["embed", *block]


def test_nodes_know_shapes_dtypes_and_what_made_their_inputs() -> None:
    graph = capture(Gated(), (IDS,), {"depth": 1}).graph
    nodes = {str(node.target): node for node in graph.nodes}
    assert nodes["down"].meta["shape"] == (3, 5, 8)
    assert nodes["down"].meta["dtype"] == torch.float32
    assert nodes["gate"].all_input_nodes == nodes["up"].all_input_nodes == [nodes["norm"]]
    (placeholder,) = nodes["embed"].all_input_nodes
    assert placeholder.op == "placeholder"
    assert not nodes["embed"].meta["trains_input"]
    assert nodes["gate"].meta["trains_input"]
    (output,) = (node for node in graph.nodes if node.op == "output")
    assert output.all_input_nodes[0].meta["shape"] == (3, 5, 11)
    graph.lint()


def test_the_model_and_its_values_are_untouched() -> None:
    model = Gated().train()
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    values = {fqn: p.detach().clone() for fqn, p in model.named_parameters()}
    state = torch.get_rng_state()
    capture(model, (IDS,))
    assert dict(model.named_parameters()) == parameters
    assert dict(model.named_buffers()) == buffers
    for fqn, parameter in model.named_parameters():
        assert torch.equal(parameter, values[fqn])
        assert parameter.grad is None
    assert torch.equal(torch.get_rng_state(), state)
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks

    class Branches(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    class Raises(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            if super().forward(input).sum() > 0:  # a value, which fakes do not have
                return input
            raise AssertionError

    raises = nn.Sequential(Raises(5, 5))
    weight = raises[0].weight
    trace = capture(raises, (torch.zeros(2, 5),))
    assert list(trace.opaque) == ["0"]  # a site is taken to return something like its input
    with pytest.raises(RuntimeError):
        capture(nn.Sequential(nn.Linear(5, 5), Branches()), (torch.zeros(2, 5),))
    assert raises[0].weight is weight
    assert "forward" not in vars(raises[0])
    assert not raises[0]._forward_hooks


def test_a_7b_model_on_the_meta_device_takes_seconds_and_no_memory() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(4096)
            self.attention = nn.MultiheadAttention(4096, 32, batch_first=True)
            self.up, self.down = nn.Linear(4096, 11008), nn.Linear(11008, 4096)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.norm(x)
            x = x + self.attention(y, y, y, need_weights=False)[0]
            return x + self.down(F.gelu(self.up(self.norm(x))))

    with torch.device("meta"):
        model = nn.Sequential(nn.Embedding(32000, 4096), *[Block() for _ in range(43)])
        x = torch.zeros(1, 512, dtype=torch.long)
    assert sum(p.numel() for p in model.parameters()) > 6.7e9
    start = time.monotonic()
    trace = capture(model, (x,))
    assert time.monotonic() - start < 60  # two seconds on an idle machine
    assert len(_targets(trace.graph, "call_module")) == 1 + 43 * 5
    assert trace.activation_bytes > 43 * 512 * 4 * (4096 + 2 * 11008)


def test_activations_are_what_autograd_saves() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.zeros(5, 6)
    # The input is the caller's. Saved: tanh's output (by tanh and by the layer after it), relu's.
    assert capture(model, (x,)).activation_bytes == 2 * 5 * 8 * 4
    # In bf16, with inputs that are cast for every module: x is another tensor then.
    half = capture(
        model,
        (x,),
        dtype_of=lambda module, dtype: torch.bfloat16,
        before_module=lambda inputs: ((inputs[0][0].bfloat16(),), {}),
    )
    assert half.activation_bytes == (2 * 5 * 8 + 5 * 6) * 2
    assert {n.meta["dtype"] for n in half.graph.nodes if n.op == "call_module"} == {torch.bfloat16}
    # A norm's input (of the first one the caller's) and one fp32 number a row, as on GPUs.
    norms = nn.Sequential(nn.RMSNorm(6), nn.Linear(6, 8), nn.RMSNorm(8)).bfloat16()
    saved = capture(norms, (x.bfloat16(),)).activation_bytes
    assert saved == 4 * 5 + 2 * 5 * 6 + 2 * 5 * 8 + 4 * 5
    with torch.no_grad():
        assert capture(model, (x,)).activation_bytes == 0
    model.requires_grad_(False)
    assert capture(model, (x,)).activation_bytes == 0


def test_checkpointed_blocks_save_their_inputs() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(
                nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)) for _ in range(3)
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False)
            return x

    trace = capture(Model(), (torch.zeros(5, 8),))
    assert trace.activation_bytes == 2 * 5 * 8 * 4  # of the three inputs one is the caller's
    assert len(_targets(trace.graph, "call_module")) == 6


def test_what_is_a_site() -> None:
    assert is_site(nn.Linear(2, 2))
    assert is_site(nn.MultiheadAttention(4, 2))
    assert is_site(nn.LSTM(2, 2))
    assert not is_site(nn.Sequential(nn.Linear(2, 2)))
    assert not is_site(nn.ReLU())
    assert not is_site(Gated())  # owns a parameter, but modules in it do, too
