"""Transformers, torch's own and a small GPT: every layer rotates, in training and in inference.

Also runs as ranks of a job: `torchrun --nproc_per_node=2 -m pytest tests/test_transformer.py`, or
`python -m torch.distributed.launch --nproc_per_node=2 tests/test_transformer.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from typing import Any

import pytest

if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from rtp_wrap import Gather, Replicate, Rotate, RotatedTensorParallel, ShardingPolicy
from rtp_wrap.modules.attention import RotatedMultiheadAttention
from rtp_wrap.modules.linear import RotatedLinear
from tests.parity import FP64, check_parity, compare_gradients, full, mean_square, sgd
from tests.ranks import DEVICE_TYPE, all_world_sizes, device, multi_world_sizes, run_ranks
from tests.rotated import events

ROTATE = ShardingPolicy(replicate_below=0)
#: The same, but all of what has no rotated form is replicated: fewer operations.
ROTATE_OR_REPLICATE = ShardingPolicy(rules={"*": Rotate(), "**": Replicate()}, replicate_below=0)
B, T, S, WIDTH, HEADS, HIDDEN = 2, 4, 5, 12, 3, 10
VOCABULARY = 17


def _random(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@contextmanager
def _ignoring_warnings() -> Iterator[None]:
    """Torch's: that nested tensors are a prototype, and that an encoder will not use them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def _all_rotate(model: nn.Module) -> None:
    """Every linear layer and every attention; those out_proj that attention calls are linears."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert isinstance(module, RotatedLinear)
        if isinstance(module, nn.MultiheadAttention):
            assert isinstance(module, RotatedMultiheadAttention)


# torch's own.


class Model(nn.Module):
    """Calls a transformer with samples first, causal and padding masks of one type."""

    def __init__(self, kind: str, batch_first: bool, norm_first: bool) -> None:
        super().__init__()
        self.kind, self.batch_first = kind, batch_first
        options: dict[str, Any] = {
            "dropout": 0.0, "batch_first": batch_first, "norm_first": norm_first,
        }  # fmt: skip
        sizes = (WIDTH, HEADS, HIDDEN)
        if kind == "encoder":
            layer: nn.Module = nn.TransformerEncoderLayer(*sizes, activation="gelu", **options)
            self.inner: nn.Module = nn.TransformerEncoder(
                layer, 2, nn.LayerNorm(WIDTH), enable_nested_tensor=False
            )
        elif kind == "decoder":
            layer = nn.TransformerDecoderLayer(*sizes, **options)
            self.inner = nn.TransformerDecoder(layer, 1)
        else:
            with _ignoring_warnings():
                self.inner = nn.Transformer(WIDTH, HEADS, 1, 1, HIDDEN, **options)

    def forward(
        self, source: torch.Tensor, target: torch.Tensor, padding: torch.Tensor
    ) -> torch.Tensor:
        if not self.batch_first:
            source, target = source.transpose(0, 1), target.transpose(0, 1)
        causal = torch.ones(T, T, dtype=torch.bool, device=source.device).triu(1)
        if self.kind == "encoder":
            output = self.inner(source, src_key_padding_mask=padding)
        elif self.kind == "decoder":
            output = self.inner(
                target, source, tgt_mask=causal, memory_key_padding_mask=padding, tgt_is_causal=True
            )
        else:
            output = self.inner(
                source,
                target,
                tgt_mask=causal,
                src_key_padding_mask=padding,
                memory_key_padding_mask=padding,
            )
        return output if self.batch_first else output.transpose(0, 1)


def _batch(step: int, rank: int) -> tuple[torch.Tensor, ...]:
    seed = 100 * step + 10 * rank
    padding = torch.arange(S) >= torch.tensor([[S], [S - 1 - rank % 2]])
    return _random(B, S, WIDTH, seed=seed), _random(B, T, WIDTH, seed=seed + 1), padding


def _train(kind: str, batch_first: bool, norm_first: bool) -> None:
    wrapped = check_parity(
        lambda: Model(kind, batch_first, norm_first),
        _batch,
        steps=2,
        policy=ROTATE_OR_REPLICATE,
    )
    _all_rotate(wrapped)


@all_world_sizes
@pytest.mark.parametrize("kind", ["encoder", "decoder", "encoder and decoder"])
def test_torchs_transformers_train_as_the_dense_ones(world_size: int, kind: str) -> None:
    run_ranks(world_size, _train, kind, batch_first=True, norm_first=False)
    run_ranks(world_size, _train, kind, batch_first=False, norm_first=True)


def _with_dropout(batch_first: bool) -> None:
    """On each rank with a seed of its own, and the same one for both models."""
    rank = dist.get_rank()
    torch.manual_seed(0)
    dense = nn.TransformerEncoderLayer(
        WIDTH, HEADS, HIDDEN, dropout=0.3, batch_first=batch_first
    ).to(device(), torch.float64)
    ours = RotatedTensorParallel(deepcopy(dense), policy=ROTATE)
    theirs = DistributedDataParallel(dense)
    optimizers = [sgd(theirs.parameters()), sgd(ours.parameters())]
    for step in range(2):
        x = _random(4, 5, WIDTH, seed=10 * step + rank).to(device())
        outputs = []
        for model, optimizer in zip((theirs, ours), optimizers, strict=True):
            torch.manual_seed(100 * step + rank)
            outputs.append(model(x))
            optimizer.zero_grad()
            mean_square(outputs[-1]).backward()
            optimizer.step()
        torch.testing.assert_close(outputs[1], outputs[0], **FP64)
        compare_gradients(theirs.module, ours, FP64, f"step {step}")


@multi_world_sizes
def test_with_the_same_seed_dropout_is_that_under_ddp(world_size: int) -> None:
    for batch_first in (False, True):
        run_ranks(world_size, _with_dropout, batch_first)


# torch's fast path in inference.


def _encoder() -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, HIDDEN, batch_first=True)
    return nn.TransformerEncoder(layer, 2).to(device(), torch.float64).eval()


def _padded() -> tuple[torch.Tensor, torch.Tensor]:
    x = _random(4, S, 8, seed=dist.get_rank()).to(device())
    lengths = torch.tensor([[5], [3], [4], [2]], device=device())
    return x, torch.arange(S, device=device()) >= lengths


def _inference(mode: Any) -> None:
    dense = _encoder()
    wrapped = RotatedTensorParallel(deepcopy(dense), policy=ROTATE)
    _all_rotate(wrapped)
    x, padding = _padded()
    rotations = [
        f"layers.{index}.{name} forward"
        for index in range(2)
        for name in ("self_attn", "self_attn.out_proj", "linear1", "linear2")
    ]
    layer, rotations_of_layer = wrapped.layers[0], rotations[:4]
    for mask in (None, padding):
        with mode(), _ignoring_warnings():
            fast = dense(x, src_key_padding_mask=mask)
            fast_layer = dense.layers[0](x, src_key_padding_mask=mask)
            torch.backends.mha.set_fastpath_enabled(False)
            try:
                slow = dense(x, src_key_padding_mask=mask)
            finally:
                torch.backends.mha.set_fastpath_enabled(True)
            with events() as seen:
                ours = wrapped(x, src_key_padding_mask=mask)
                assert [each for each in seen if "forward" in each] == rotations
                # What is gathered is the biases and the norms: here nothing is replicated.
                gathered = [each for each in seen if each not in rotations]
                assert all(each.endswith(("bias gather", "norm1.weight gather",
                                          "norm2.weight gather")) for each in gathered)  # fmt: skip
                seen.clear()
                ours_of_layer = layer(x, src_key_padding_mask=mask)
                assert [each for each in seen if "forward" in each] == rotations_of_layer
        assert torch.backends.mha.get_fastpath_enabled()
        torch.testing.assert_close(ours, slow, **FP64)
        # The fast path differs by the order of sums, and by its zeros where there is padding.
        real = torch.ones_like(padding) if mask is None else ~padding
        torch.testing.assert_close(ours[real], fast[real], **FP64)
        torch.testing.assert_close(ours_of_layer[real], fast_layer[real], **FP64)
        assert mask is None or fast[3, 4].abs().sum() == 0, "the dense model took no fast path"
    wrapped.train()
    mean_square(wrapped(x)).backward()


@multi_world_sizes
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_rotates_where_torch_would_take_whole_weights(world_size: int, mode: Any) -> None:
    run_ranks(world_size, _inference, mode)


def _keeps_fast_path(policy: ShardingPolicy) -> None:
    dense = _encoder()
    wrapped = RotatedTensorParallel(deepcopy(dense), policy=policy)
    x, padding = _padded()
    with torch.no_grad(), _ignoring_warnings():
        expected = dense(x, src_key_padding_mask=padding)
        ours = wrapped(x, src_key_padding_mask=padding)
    assert ours[3, 4].abs().sum() == 0
    torch.testing.assert_close(ours, expected, **FP64)


@all_world_sizes
def test_where_nothing_rotates_torchs_fast_path_stays(world_size: int) -> None:
    run_ranks(world_size, _keeps_fast_path, ShardingPolicy(rules={"*": Gather()}))
    run_ranks(world_size, _keeps_fast_path, ShardingPolicy())  # all small, so replicated
    if world_size == 1:
        run_ranks(world_size, _keeps_fast_path, ROTATE)


def _copies() -> None:
    dense = _encoder()
    wrapped = RotatedTensorParallel(deepcopy(dense), policy=ROTATE)
    wrapped.use_nested_tensor = True  # has no effect
    x, padding = _padded()
    with torch.no_grad():
        copy = deepcopy(wrapped)
        for model in (wrapped, copy):
            with events() as seen:
                model(x, src_key_padding_mask=padding)
            assert "layers.1.linear2 forward" in seen


@multi_world_sizes
def test_copies_have_no_fast_path_either(world_size: int) -> None:
    run_ranks(world_size, _copies)


# A small GPT.


class Block(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 30), nn.GELU(), nn.Linear(30, WIDTH))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, attn_mask=mask, need_weights=False, is_causal=True)[0]
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Tokens ``[B, T]`` to logits ``[B, T, VOCABULARY]``, by a head tied to the embedding."""

    def __init__(self, checkpointing: str = "no", batch_first: bool = True) -> None:
        super().__init__()
        self.checkpointing, self.batch_first = checkpointing, batch_first
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Parameter(torch.randn(T, WIDTH))
        self.blocks = nn.ModuleList(Block(batch_first) for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids) + self.positions
        mask = nn.Transformer.generate_square_subsequent_mask(T, x.device, x.dtype)
        if not self.batch_first:
            x = x.transpose(0, 1)
        for block in self.blocks:
            if self.checkpointing == "no":
                x = block(x, mask)
            else:
                reentrant = self.checkpointing == "reentrant"
                x = checkpoint(block, x, mask, use_reentrant=reentrant)
        logits = self.head(self.norm(x))
        return logits if self.batch_first else logits.transpose(0, 1)


def _ids(step: int, rank: int) -> tuple[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return (torch.randint(VOCABULARY, (B, T), generator=generator),)


def _train_gpt(checkpointing: str, **wrap: Any) -> None:
    """Three steps, with losses of earlier steps alive."""
    for batch_first in (True, False) if checkpointing == "no" else (True,):
        model = partial(GPT, checkpointing, batch_first)
        _all_rotate(check_parity(model, _ids, policy=ROTATE, **wrap))


@all_world_sizes
def test_a_gpt_trains_as_the_dense_one(world_size: int) -> None:
    run_ranks(world_size, _train_gpt, "no")


@all_world_sizes
@pytest.mark.parametrize("checkpointing", ["reentrant", "non-reentrant"])
def test_its_blocks_may_be_checkpointed(world_size: int, checkpointing: str) -> None:
    run_ranks(world_size, _train_gpt, checkpointing, inplace=checkpointing == "reentrant")


def _autocast() -> list[tuple[float, float]]:
    """Relative distances to fp32, by gradient: (ours, those of a dense model in autocast)."""
    torch.manual_seed(0)
    dense = GPT().to(device())
    wrapped = RotatedTensorParallel(deepcopy(dense), policy=ROTATE)
    ids = _ids(0, 0)[0].to(device())  # the same on all ranks
    results = []
    for model, enabled in ((dense, False), (dense, True), (wrapped, True)):
        model.zero_grad()
        with torch.autocast(DEVICE_TYPE, torch.bfloat16, enabled=enabled):
            logits = model(ids)
            assert (logits.dtype == torch.bfloat16) == enabled
            loss = F.cross_entropy(logits.flatten(0, 1), ids.roll(1, 1).flatten())
        loss.backward()
        grads = {fqn: full(p.grad) for fqn, p in model.named_parameters()}
        # The keys' bias moves all scores of a query alike: its gradient is nothing but rounding.
        for fqn, grad in grads.items():
            if fqn.endswith("in_proj_bias"):
                grads[fqn] = torch.cat([grad[:WIDTH], grad[2 * WIDTH :]])
        results.append([loss.detach(), *grads.values()])
    exact, theirs, ours = results
    assert all(each.dtype == torch.float32 for each in ours)

    def error(tensor: torch.Tensor, true: torch.Tensor) -> float:
        return float((tensor - true).norm() / true.norm())

    return [(error(a, c), error(b, c)) for a, b, c in zip(ours, theirs, exact, strict=True)]


@multi_world_sizes
def test_in_autocast_it_is_as_precise_as_the_dense_one(world_size: int) -> None:
    """Gradients and the loss, by their distance to fp32, against those of a dense bf16 model.

    Both round every product to bf16, whose epsilon is 2**-7, in places that differ by the order of
    sums: errors of one size, not the same ones. Each is held to twice the other's and two epsilons.
    """
    for errors in run_ranks(world_size, _autocast):
        for ours, theirs in errors:
            assert ours <= 2 * theirs + 2 * torch.finfo(torch.bfloat16).eps


# What the original does to attention (row 6 of what it gets wrong).


def _original(attention: nn.MultiheadAttention) -> tuple[nn.Module, Any]:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = attention

        def forward(self, x: torch.Tensor, **options: Any) -> Any:
            return self.attention(x, x, x, **options)

    dense = Wrapped().to(device(), torch.float64)
    return dense, RotatedTensorParallel(deepcopy(dense), policy=ROTATE)


def _own(*shape: int) -> torch.Tensor:
    return _random(*shape, seed=dist.get_rank()).to(device())


def _row_6_rotates() -> None:
    _, wrapped = _original(nn.MultiheadAttention(WIDTH, HEADS))
    with events() as seen:
        wrapped(_own(S, B, WIDTH))
    assert "attention forward" in seen
    assert "attention.out_proj forward" in seen
    assert not any(each.endswith("weight gather") for each in seen)
    for name in ("in_proj_weight", "out_proj.weight"):
        weight = wrapped.attention.get_parameter(name)
        kept = weight.to_local().untyped_storage().nbytes() // weight.itemsize
        assert kept <= -(-weight.shape[0] // dist.get_world_size()) * weight.shape[1]


@multi_world_sizes
def test_6_attention_inside_the_wrapper_rotates(world_size: int) -> None:
    run_ranks(world_size, _row_6_rotates)


def _row_6_options() -> None:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, add_bias_kv=True)
    with torch.no_grad():
        layer.out_proj.bias.normal_()  # torch begins with zeros
        layer.in_proj_bias.normal_()
    dense, wrapped = _original(layer)
    x = _own(B, S, WIDTH)
    assert wrapped.attention.batch_first
    torch.testing.assert_close(wrapped(x), dense(x), **FP64)
    for name in ("bias_k", "bias_v", "out_proj.bias", "in_proj_bias"):
        torch.testing.assert_close(
            full(wrapped.attention.get_parameter(name).detach()), layer.get_parameter(name).detach()
        )
        with torch.no_grad():  # each of them matters
            changed = deepcopy(wrapped)
            changed.attention.get_parameter(name).add_(1.0)
        assert not torch.allclose(changed(x)[0], dense(x)[0])


@all_world_sizes
def test_6_batch_first_the_biases_of_k_and_v_and_that_of_out_proj_are_kept(world_size: int) -> None:
    run_ranks(world_size, _row_6_options)


def _row_6_dropout() -> None:
    dense, wrapped = _original(nn.MultiheadAttention(WIDTH, HEADS, dropout=0.9))
    x = _own(S, B, WIDTH)
    for options in ({}, {"need_weights": False}):
        expected = dense.eval()(x, **options)
        for _ in range(2):
            torch.testing.assert_close(wrapped.eval()(x, **options), expected, **FP64)
        assert not torch.allclose(wrapped.train()(x, **options)[0], expected[0])


@all_world_sizes
def test_6_dropout_is_off_in_eval(world_size: int) -> None:
    run_ranks(world_size, _row_6_dropout)


def _row_6_weights() -> None:
    dense, wrapped = _original(nn.MultiheadAttention(WIDTH, HEADS))
    x = _own(S, B, WIDTH)
    _, expected = dense(x, average_attn_weights=False)
    _, weights = wrapped(x, average_attn_weights=False)
    assert weights.shape == (B, HEADS, S, S)
    torch.testing.assert_close(weights, expected, **FP64)
    torch.testing.assert_close(wrapped(x)[1], expected.mean(1), **FP64)


@all_world_sizes
def test_6_the_attention_weights_of_all_heads_come_back(world_size: int) -> None:
    run_ranks(world_size, _row_6_weights)
