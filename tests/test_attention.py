"""`nn.MultiheadAttention` on rotating projections, against the dense layer on the whole batch.

Also runs as ranks of a job: `torchrun --nproc_per_node=2 -m pytest tests/test_attention.py`, or
`python -m torch.distributed.launch --nproc_per_node=2 tests/test_attention.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import pytest

if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))

import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

from rtp_wrap import (
    Gather,
    MixedPrecisionPolicy,
    Replicate,
    Rotate,
    RotatedTensorParallel,
    ShardingPolicy,
)
from rtp_wrap.modules import Adopted
from rtp_wrap.modules.attention import RotatedMultiheadAttention
from rtp_wrap.modules.linear import RotatedLinear
from tests.parity import FP64, check_parity, fulls, mean_square
from tests.ranks import (
    DEVICE_TYPE,
    WORLD_SIZES,
    all_world_sizes,
    device,
    multi_world_sizes,
    run_ranks,
)
from tests.rotated import TINY, events, no_communication

#: Everything that can be rotated is, whatever its size.
ROTATE = ShardingPolicy(replicate_below=0)
#: The same, but what has no rotated form is replicated, not gathered: fewer operations.
ROTATE_OR_REPLICATE = ShardingPolicy(rules={"*": Rotate(), "**": Replicate()}, replicate_below=0)
B, L, S = 2, 3, 4  # samples of a rank, queries, keys


@dataclass(frozen=True)
class Options:
    """What a layer is made with, and how it is called."""

    heads: int = 3
    features: int = 4  # of a head
    kdim: int | None = None
    vdim: int | None = None
    bias: bool = True
    bias_kv: bool = False
    zero: bool = False
    batch_first: bool = True
    batched: bool = True
    #: Which of query, key and value are one tensor: all, the last two, or none.
    same: str = "all"
    weights: str = "averaged"  # or "per head", "no"
    padding: str = "no"  # or "bool", "float"
    #: Or "2-D bool", "3-D bool", "2-D float", "3-D float", "learned", "causal", or "hint".
    mask: str = "no"

    @property
    def width(self) -> int:
        return self.heads * self.features


class Attends(nn.Module):
    """Calls the layer in every way, with samples first in all arguments and results."""

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.options = o = options
        self.before = nn.Linear(o.width, o.width)  # so that inputs of attention need gradients
        self.inner = nn.MultiheadAttention(
            o.width, o.heads, bias=o.bias, add_bias_kv=o.bias_kv, add_zero_attn=o.zero,
            kdim=o.kdim, vdim=o.vdim, batch_first=o.batch_first,
        )  # fmt: skip
        with torch.no_grad():  # torch begins with zeros, which would hide a lost bias
            for name, parameter in self.inner.named_parameters():
                if "bias" in name:
                    parameter.normal_()
        if o.mask == "learned":
            self.distances = nn.Parameter(torch.randn(L, L if o.same == "all" else S))

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        padding: torch.Tensor | None,
        mask: torch.Tensor | None,
    ) -> Any:
        query = self.before(query)
        if self.options.same == "all":
            key = value = query
        elif self.options.same == "key and value":
            value = key
        if self.options.batched:
            return self._call(query, key, value, padding, mask)
        heads = self.options.heads
        results = [
            self._call(
                query[i],
                *(query[i],) * 2 if key is query else (key[i], value[i]),
                None if padding is None else padding[i],
                mask[heads * i : heads * (i + 1)] if mask is not None and mask.dim() > 2 else mask,
            )
            for i in range(len(query))
        ]
        columns = zip(*results, strict=True)
        return [None if parts[0] is None else torch.stack(parts) for parts in columns]

    def _call(self, query: Any, key: Any, value: Any, padding: Any, mask: Any) -> Any:
        o, arguments = self.options, [query, key, value]
        swaps = o.batched and not o.batch_first
        if swaps:
            swapped = {id(each): each.transpose(0, 1) for each in arguments}  # one stays one
            arguments = [swapped[id(each)] for each in arguments]
        length, source = query.shape[-2], key.shape[-2]
        if o.mask.startswith("2-D") or o.mask == "hint":
            mask = _forbidden(length, source, device=query.device)
            if o.mask == "2-D float":
                mask = torch.where(mask, -1.5, 0.25).to(query.dtype)
        elif o.mask == "learned":
            mask = self.distances
        elif o.mask == "causal":
            mask = torch.ones(length, source, dtype=torch.bool, device=query.device).triu(1)
        output, weights = self.inner(
            *arguments,
            key_padding_mask=padding,
            need_weights=o.weights != "no",
            attn_mask=mask,
            average_attn_weights=o.weights == "averaged",
            is_causal=o.mask in ("causal", "hint"),
        )
        assert (weights is None) == (o.weights == "no")
        return output.transpose(0, 1) if swaps else output, weights


def _forbidden(*shape: int, **where: Any) -> torch.Tensor:
    """A bool mask that forbids every third score, but never all of a row."""
    count = torch.Size(shape).numel()
    return (torch.arange(count, **where) % 3 == 1).view(shape)


def _random(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _batch(options: Options, step: int, rank: int) -> tuple[Any, ...]:
    seed, width = 100 * step + 10 * rank, options.width
    source = L if options.same == "all" else S
    padding = mask = None
    if options.padding != "no":
        padding = torch.arange(source) >= torch.tensor([[source], [source - 1 - rank % 2]])
        if options.padding == "float":
            padding = torch.where(padding, _random(B, source, seed=seed + 3), 0.0)
    if options.mask.startswith("3-D"):
        mask = _forbidden(B * options.heads, L, source)
        if options.mask == "3-D float":
            mask = torch.where(mask, _random(*mask.shape, seed=seed + 4), 0.0)
    return (
        _random(B, L, width, seed=seed),
        _random(B, source, options.kdim or width, seed=seed + 1),
        _random(B, source, options.vdim or width, seed=seed + 2),
        padding,
        mask,
    )


def _train(options: Options, *, steps: int = 2, **wrap: Any) -> None:
    wrap.setdefault("policy", ROTATE_OR_REPLICATE)
    wrapped = check_parity(
        lambda: Attends(options),
        lambda step, rank: _batch(options, step, rank),
        steps=steps,
        **wrap,
    )
    assert isinstance(wrapped.inner, RotatedMultiheadAttention)


def _train_all(cases: list[Options], **wrap: Any) -> None:
    for case in cases:
        _train(case, **wrap)


_O = Options
CASES: dict[str, list[Options]] = {
    "self-attention": [_O(), _O(batch_first=False, weights="no"), _O(bias=False, heads=1)],
    "one tensor for key and value": [
        _O(same="key and value", weights="per head"),
        _O(same="key and value", weights="no", batch_first=False, bias=False),
    ],
    "three tensors": [_O(same="none", batch_first=False), _O(same="none", weights="no", heads=5)],
    "other widths": [
        _O(same="none", kdim=5, vdim=7, weights="no"),
        _O(same="none", kdim=5, bias=False, batch_first=False),
        _O(same="key and value", kdim=5, vdim=5, bias_kv=True, weights="per head"),
    ],
    "bias_k, bias_v and zero attention": [
        _O(bias_kv=True, mask="2-D bool", padding="bool", weights="per head"),
        _O(zero=True, same="key and value", weights="no", padding="float", mask="2-D float"),
        _O(bias_kv=True, zero=True, batch_first=False),
        _O(bias_kv=True, zero=True, weights="no", mask="3-D bool"),
    ],
    "masks": [
        _O(mask="2-D bool", padding="bool"),
        _O(mask="3-D float", padding="float", weights="no", batch_first=False),
        _O(mask="3-D bool", same="none", weights="per head"),
        _O(mask="learned", weights="no", padding="float"),
        _O(mask="learned", same="none"),
    ],
    "is_causal": [
        _O(mask="causal"),
        _O(mask="causal", weights="no"),
        _O(mask="causal", weights="no", padding="bool"),
        _O(mask="causal", weights="no", same="none", bias_kv=True),
        _O(mask="hint"),  # a wrong one, which counts where torch has nothing else to do
        _O(mask="hint", weights="no"),
        _O(mask="hint", weights="no", padding="bool"),
    ],
    "without a batch": [
        _O(batched=False),
        _O(batched=False, batch_first=False, same="none", weights="no", padding="bool"),
        _O(batched=False, mask="3-D float", padding="float", weights="per head", zero=True),
    ],
}  # fmt: skip


@all_world_sizes
@pytest.mark.parametrize("cases", CASES)
def test_every_option_trains_as_in_the_dense_layer(world_size: int, cases: str) -> None:
    run_ranks(world_size, _train_all, CASES[cases])


@st.composite
def _options(draw: Callable[..., Any]) -> Options:
    same = draw(st.sampled_from(["all", "key and value", "none"]))
    kind = draw(st.sampled_from(["bool", "float"]))  # masks of different types are deprecated
    others = st.none() if same == "all" else st.none() | st.integers(1, 9)
    kdim, vdim = draw(others), draw(others)
    masks = ["no", f"2-D {kind}", f"3-D {kind}"]
    masks += ["causal"] if kind == "bool" else ["learned"]
    options = Options(
        heads=draw(st.integers(1, 5)),
        features=draw(st.integers(1, 6)),
        same=same,
        kdim=kdim,
        vdim=kdim if same == "key and value" else vdim,
        weights=draw(st.sampled_from(["averaged", "per head", "no"])),
        padding=draw(st.sampled_from(["no", kind])),
        mask=draw(st.sampled_from(masks)),
        **{
            name: draw(st.booleans())
            for name in ("bias", "bias_kv", "zero", "batch_first", "batched")
        },
    )
    return options


@settings(max_examples=max(1, settings().max_examples * 3 // 5))
@given(
    world_size=st.sampled_from(WORLD_SIZES),
    options=_options(),
    dims=st.tuples(*[st.sampled_from([0, 1])] * 2),
    staging_bytes=st.sampled_from([TINY, 3 * TINY, None]),
    inplace=st.booleans(),
)
def test_training_is_right_whatever_the_options(
    world_size: int, options: Options, dims: tuple[int, int], staging_bytes: int, inplace: bool
) -> None:
    rules = {"*out_proj": Rotate(dims[1]), "*": Rotate(dims[0])}
    policy = ShardingPolicy(rules=rules, replicate_below=0, staging_bytes=staging_bytes)
    run_ranks(world_size, _train, options, policy=policy, inplace=inplace)


#: Rules, and the weights of the layer that they rotate.
RULES: dict[str, tuple[dict[Any, Any], set[str]]] = {
    "out_proj only": ({"*in_proj*": Gather()}, {"out_proj.weight"}),
    "out_proj only, in_proj replicated": ({"*in_proj*": Replicate()}, {"out_proj.weight"}),
    "in_proj only": ({"*out_proj*": Gather()}, {"in_proj_weight"}),
    "biases gathered": ({"*bias*": Gather()}, {"in_proj_weight", "out_proj.weight"}),
    "biases replicated": ({"*bias*": Replicate()}, {"in_proj_weight", "out_proj.weight"}),
    "columns": ({"inner": Rotate(1)}, {"in_proj_weight", "out_proj.weight"}),
}
#: The same for a layer with separate weights.
SEPARATE: dict[str, tuple[dict[Any, Any], set[str]]] = {
    "q only": (
        {"*[kv]_proj_weight": Gather(), "*out_proj*": Replicate()},
        {"q_proj_weight"},
    ),
    "k, by columns, and v": (
        {"*.q_proj*": Replicate(), "*.k_proj*": Rotate(1), "*out_proj*": Gather()},
        {"k_proj_weight", "v_proj_weight"},
    ),
}


def _rotated(layer: nn.Module) -> set[str]:
    found = set()
    for prefix, module in (("", layer), ("out_proj.", layer.get_submodule("out_proj"))):
        assert isinstance(module, Adopted)
        assert module._adoption is not None
        for name, strategy in module._adoption.strategies.items():
            if isinstance(strategy, Rotate):
                found.add(prefix + name)
    return found


def _train_rules(options: Options, cases: dict[str, tuple[dict[Any, Any], set[str]]]) -> None:
    for rules, expected in cases.values():
        wrapped = check_parity(
            lambda: Attends(options),
            lambda step, rank: _batch(options, step, rank),
            steps=2,
            policy=ShardingPolicy(rules={"before": Replicate(), **rules}, replicate_below=0),
        )
        assert _rotated(wrapped.inner) == expected
        assert isinstance(wrapped.inner, RotatedMultiheadAttention)
        assert isinstance(wrapped.inner.out_proj, RotatedLinear) == ("out_proj.weight" in expected)


@multi_world_sizes
def test_any_of_the_weights_may_rotate(world_size: int) -> None:
    packed = Options(bias_kv=True, batch_first=False, weights="no")
    separate = Options(same="none", kdim=5, vdim=7)
    run_ranks(world_size, _train_rules, packed, RULES)
    run_ranks(world_size, _train_rules, separate, SEPARATE)


class Overridden(nn.MultiheadAttention):
    """Does something of its own with the weights."""

    def forward(self, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        output, weights = super().forward(query, *args, **kwargs)
        return output + query @ self.in_proj_weight[: self.embed_dim], weights


class Renamed(nn.MultiheadAttention):
    """The same layer by another name."""


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def _parametrised() -> nn.Module:
    layer = nn.MultiheadAttention(8, 2)
    parametrize.register_parametrization(layer, "in_proj_weight", Doubled())
    return layer


class SelfAttention(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> Any:
        x = x.transpose(0, 1)
        return self.inner(x, x, x, need_weights=False)[0].transpose(0, 1)


def _train_kind(make: Callable[[], nn.Module], policy: ShardingPolicy, rotated: bool) -> None:
    wrapped = check_parity(
        lambda: SelfAttention(make()),
        lambda step, rank: (_random(B, L, 8, seed=10 * step + rank),),
        steps=2,
        policy=policy,
    )
    assert isinstance(wrapped.inner, RotatedMultiheadAttention) == rotated


def _make_overridden() -> nn.Module:
    return Overridden(8, 2)


def _make_renamed() -> nn.Module:
    return Renamed(8, 2)


def _make_plain() -> nn.Module:
    return nn.MultiheadAttention(8, 2)


@multi_world_sizes
def test_a_forward_of_its_own_or_weights_that_do_not_rotate_keep_torchs_forward(
    world_size: int,
) -> None:
    run_ranks(world_size, _train_kind, _make_overridden, ROTATE, rotated=False)
    run_ranks(world_size, _train_kind, _make_renamed, ROTATE, rotated=True)
    run_ranks(world_size, _train_kind, _parametrised, ROTATE, rotated=True)  # for out_proj
    for rules in ({"*": Gather()}, {"*": Replicate()}):
        run_ranks(world_size, _train_kind, _make_plain, ShardingPolicy(rules=rules), rotated=False)


def _pair(*, policy: ShardingPolicy = ROTATE, **options: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    dense = nn.MultiheadAttention(12, 3, **options).to(device(), torch.float64)
    return dense, RotatedTensorParallel(deepcopy(dense), policy=policy)


def _count_rotations() -> None:
    """With biases replicated, whose gradients are averaged in one operation in the end."""
    policy = ShardingPolicy(rules={"*bias": Replicate()}, replicate_below=0)
    _, wrapped = _pair(policy=policy)
    x, y = (_random(B, L, 12, seed=seed).to(device()) for seed in (0, 1))
    ins, out = "the root MultiheadAttention", "out_proj"
    for arguments in ((x, x, x), (x, y, y), (x, y, x)):
        with events() as seen:
            output, _ = wrapped(*(each.requires_grad_() for each in arguments))
            assert seen == [f"{ins} forward", f"{out} forward"]
            seen.clear()
            output.sum().backward()
        assert seen[:2] == [f"{out} backward (dx dw)", f"{ins} backward (dx dw)"]
        assert len(seen) == 3
    wrapped.eval()
    with events() as seen, torch.no_grad():  # where torch has a fast path on whole weights
        wrapped(x, x, x)
    assert seen == [f"{ins} forward", f"{out} forward"]


@multi_world_sizes
def test_q_k_and_v_are_one_rotation_and_nothing_is_gathered(world_size: int) -> None:
    run_ranks(world_size, _count_rotations)


def _dropout(batch_first: bool, need_weights: bool) -> None:
    rank = dist.get_rank()
    dense, wrapped = _pair(dropout=0.4, batch_first=batch_first)
    x = _random(5, 6, 12, seed=rank).to(device())
    results = []
    for model in (dense, wrapped):
        torch.manual_seed(1 + rank)
        results.append(model(x, x, x, need_weights=need_weights, average_attn_weights=False))
    torch.testing.assert_close(results[1], results[0], **FP64)
    assert results[1][0].stride() == results[0][0].stride()
    if need_weights:  # the same weights were drawn, all of the heads are there
        assert results[1][1].shape == (5 if batch_first else 6, 3, *[6 if batch_first else 5] * 2)
        assert torch.equal(results[1][1] == 0, results[0][1] == 0)
        assert (results[1][1] == 0).any()
    for model in (dense.eval(), wrapped.eval()):
        results.append(model(x, x, x, need_weights=need_weights, average_attn_weights=False))
    torch.testing.assert_close(results[3], results[2], **FP64)
    assert torch.equal(wrapped(x, x, x)[0], wrapped(x, x, x)[0])


@multi_world_sizes
@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_draws_what_torch_draws_and_only_in_training(
    world_size: int, need_weights: bool
) -> None:
    for batch_first in (False, True):
        run_ranks(world_size, _dropout, batch_first, need_weights)


def _evaluate() -> None:
    dense, wrapped = _pair(batch_first=True)
    x = _random(B, L, 12, seed=dist.get_rank()).to(device())
    padding = torch.tensor([[False] * L, [False] * (L - 1) + [True]], device=device())
    for model in (dense, wrapped):
        model.eval()
    for mode in (torch.no_grad, torch.inference_mode):
        for need_weights in (False, True):
            with mode():
                arguments = {"key_padding_mask": padding, "need_weights": need_weights}
                expected, ours = dense(x, x, x, **arguments), wrapped(x, x, x, **arguments)
            torch.testing.assert_close(ours, expected, **FP64)
    wrapped.train()
    mean_square(wrapped(x, x, x)).backward()  # and training goes on


@multi_world_sizes
def test_in_inference_it_computes_what_torchs_fast_path_does(world_size: int) -> None:
    run_ranks(world_size, _evaluate)


def _exactly() -> None:
    for options in ({}, {"batch_first": True, "add_bias_kv": True, "dropout": 0.5}):
        x = _random(B, L, 12, seed=0).to(device())
        results: list[list[torch.Tensor]] = []
        for model in _pair(**options):
            torch.manual_seed(1)
            output, weights = model(x, x, x)
            output.sum().backward()
            without, _ = model.eval()(x, x, x, need_weights=False)
            results.append([output, weights, without, *fulls(p.grad for p in model.parameters())])
        for theirs, ours in zip(*results, strict=True):
            assert torch.equal(ours, theirs)


def test_one_rank_computes_bit_for_bit_what_torch_does() -> None:
    run_ranks(1, _exactly)


MIXED: dict[str, dict[str, Any]] = {
    "autocast": {},
    "param_dtype": {"mixed_precision": MixedPrecisionPolicy(param_dtype=torch.bfloat16)},
}


def _errors(kind: str, options: dict[str, Any], call: dict[str, Any]) -> list[tuple[float, float]]:
    """Relative distances to the layer in fp64, by tensor: (ours, those of torch's layer)."""
    torch.manual_seed(0)
    low = nn.MultiheadAttention(48, 6, **options).to(device())
    truth = deepcopy(low).double()
    ours = RotatedTensorParallel(deepcopy(low), policy=ROTATE, **MIXED[kind])
    if kind == "param_dtype":
        low = low.bfloat16()

    def run(model: nn.Module, dtype: torch.dtype) -> list[torch.Tensor]:
        x = _random(4, 8, 48, seed=0).to(device(), dtype)  # the same data on all ranks
        cast = {
            name: each.to(device(), dtype) if each.is_floating_point() else each.to(device())
            for name, each in call.items()
        }
        output, weights = model(x, x, x, **cast)
        assert weights.shape == (8, 4, 4 + len(options))
        output.to(torch.promote_types(output.dtype, torch.float32)).sin().mean().backward()
        return [output.detach(), weights.detach(), *fulls(p.grad for p in model.parameters())]

    expected = run(truth, torch.float64)
    with torch.autocast(DEVICE_TYPE, torch.bfloat16, enabled=kind == "autocast"):
        mine = run(ours, torch.float32)
        theirs = run(low, torch.bfloat16 if kind == "param_dtype" else torch.float32)
    assert [each.dtype for each in mine[:1]] == [each.dtype for each in theirs[:1]]

    def error(tensor: torch.Tensor, true: torch.Tensor) -> float:
        assert tensor.isfinite().all()
        return float((tensor.double() - true).norm() / true.norm())

    return [(error(a, c), error(b, c)) for a, b, c in zip(mine, theirs, expected, strict=True)]


@multi_world_sizes
@pytest.mark.parametrize("kind", MIXED)
def test_in_bf16_it_is_as_precise_as_torchs_layer(world_size: int, kind: str) -> None:
    """Compared by their distances to fp64, of a dense layer in the same precision.

    Both round each intermediate once, in different places; sums over tiles and over ranks round
    their parts, too. Allowed is half as much again, and two epsilons.
    """
    epsilon = torch.finfo(torch.bfloat16).eps
    mask = torch.ones(4, 4, dtype=torch.bool).triu(1)
    for options, call in (
        ({}, {"attn_mask": mask}),
        ({"add_bias_kv": True}, {"attn_mask": torch.where(mask, -2.0, 0.0)}),
    ):
        for errors in run_ranks(world_size, _errors, kind, options, call):
            for ours, theirs in errors:
                assert ours <= 1.5 * theirs + 2 * epsilon


def _mask_types() -> None:
    dense, wrapped = _pair(batch_first=True)
    x = _random(B, L, 12, seed=0).to(device())
    causal = torch.ones(L, L, dtype=torch.bool, device=device()).triu(1)
    padding = torch.zeros(B, L, dtype=torch.float64, device=device())
    for need_weights in (True, False):
        with pytest.warns(UserWarning, match="deprecated"):
            expected = dense(
                x, x, x, key_padding_mask=padding, attn_mask=causal, need_weights=need_weights
            )
        with pytest.warns(UserWarning, match=r"^the root MultiheadAttention: .* different types"):
            ours = wrapped(
                x, x, x, key_padding_mask=padding, attn_mask=causal, need_weights=need_weights
            )
        torch.testing.assert_close(ours, expected, **FP64)
        # A float mask may be of another dtype than the query.
        floats = torch.where(causal, -1.5, 0.25)
        expected = dense(x, x, x, attn_mask=floats.double(), need_weights=need_weights)
        ours = wrapped(x, x, x, attn_mask=floats.half(), need_weights=need_weights)
        torch.testing.assert_close(ours, expected, **FP64)


@multi_world_sizes
def test_masks_of_different_types_warn_and_work(world_size: int) -> None:
    run_ranks(world_size, _mask_types)


def _wrong_inputs() -> None:
    torch.manual_seed(0)
    model = SelfAttention(nn.MultiheadAttention(6, 2, kdim=5)).to(device(), torch.float64)
    layer = RotatedTensorParallel(model, policy=ROTATE).inner
    q, k, v = _random(L, B, 6, seed=0), _random(S, B, 5, seed=1), _random(S, B, 6, seed=2)
    bools = {"dtype": torch.bool, "device": device()}
    nested = torch.nested.nested_tensor([q[0], q[1]], layout=torch.jagged)
    for inputs, options, error, message in (
        ((q, k, v), {"is_causal": True}, RuntimeError, "is_causal says that attn_mask is causal"),
        ((nested, k, v), {}, TypeError, r"does not take nested tensors: .*Gather\(\)"),
        ((q, k[:, 0], v), {}, ValueError, r"query \(3, 2, 6\), key \(4, 5\), .* three dimensions"),
        ((q[None], k[None], v[None]), {}, ValueError, "give three dimensions each, or two"),
        ((q, v, v), {}, ValueError, r"do not end in the layer's \(6, 5, 6\) features"),
        ((q[:, :1], k, v), {}, ValueError, "of one batch, with as many keys as values"),
        ((q, k[:3], v), {}, ValueError, "of one batch, with as many keys as values"),
        ((q, k, v), {"attn_mask": torch.zeros(L, L, **bools)}, ValueError,
         r"attn_mask has the shape \(3, 3\), but should have \(3, 4\) or \(4, 3, 4\)"),
        ((q, k, v), {"key_padding_mask": torch.zeros(S, B, **bools)}, ValueError,
         r"key_padding_mask has the shape \(4, 2\), but should have \(2, 4\)"),
        ((q, k, v), {"attn_mask": torch.zeros(L, S, dtype=torch.long)}, TypeError,
         "attn_mask is torch.int64: give a bool or a float mask"),
    ):  # fmt: skip
        with (
            no_communication(),
            pytest.raises(error, match=rf"^inner: .*{message}"),
        ):
            layer(*(each.to(device()) for each in inputs), **options)
    layer(*(each.to(device()) for each in (q, k, v)))[0].sum().backward()  # still works


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
@multi_world_sizes
def test_wrong_inputs_are_refused_by_name_before_anything_is_sent(world_size: int) -> None:
    run_ranks(world_size, _wrong_inputs)


def _reuse_and_copy() -> None:
    options = replace(Options(), weights="no")
    dense = Attends(options).to(device(), torch.float64)
    wrapped = RotatedTensorParallel(deepcopy(dense), policy=ROTATE)
    arguments = [
        each.to(device()) if isinstance(each, torch.Tensor) else each
        for each in _batch(options, 0, dist.get_rank())
    ]
    copy = deepcopy(wrapped)
    assert isinstance(copy.inner, RotatedMultiheadAttention)
    for model in (wrapped, copy):
        torch.testing.assert_close(model(*arguments), dense(*arguments), **FP64)
    names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    assert all(getattr(wrapped.inner, name) is None for name in names)
    assert "in_proj_weight: Rotate(dim=0), 1/" in repr(wrapped)


@all_world_sizes
def test_copies_rotate_and_the_repr_shows_it(world_size: int) -> None:
    run_ranks(world_size, _reuse_and_copy)
