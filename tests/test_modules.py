"""A zoo: every module that trains under DDP trains here, whatever becomes of its parameters."""

from __future__ import annotations

import random
import types
import warnings
from collections import OrderedDict
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.fx import symbolic_trace
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, parametrize

if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))

from rtp_wrap import Gather, Replicate, RotatedTensorParallel, ShardingPolicy
from tests.parity import (
    FP64,
    Batch,
    check_parity,
    compare_gradients,
    compare_weights,
    mean_square,
    sgd,
)
from tests.ranks import (
    DEVICE_TYPE,
    THOROUGH,
    all_world_sizes,
    device,
    multi_world_sizes,
    run_ranks,
)

SHARDED = ShardingPolicy(replicate_below=0)
#: What a case is wrapped with. The zoo is small: by default nearly all of it is replicated.
WRAPPINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "everything sharded": {"policy": SHARDED},
    "everything gathered": {"policy": {"*": Gather()}},
    "everything replicated": {"policy": {"*": Replicate()}},
    "tiny staging": {"policy": ShardingPolicy(replicate_below=0, staging_bytes=1024)},
    "in place": {"policy": SHARDED, "inplace": True},
}
#: All of them everywhere take minutes.
SELECTED = {
    1: ["everything sharded"],
    2: ["default", "everything gathered"],
    3: ["in place"],
    4: ["tiny staging"],
}
B = 4  # samples per rank and step

#: Name -> (build, batch, further arguments of check_parity).
ZOO: dict[str, tuple[Callable[[], nn.Module], Batch, dict[str, Any]]] = {}


def show(name: str, build: Callable[[], nn.Module], batch: Batch, **options: Any) -> None:
    assert name not in ZOO
    ZOO[name] = build, batch, options


def floats(*shapes: tuple[int, ...]) -> Batch:
    """One normal tensor per shape, other values in each step and on each rank."""

    def batch(step: int, rank: int) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(100 * step + rank)
        return tuple(torch.randn(shape, generator=generator) for shape in shapes)

    return batch


def integers(high: int, *shape: int) -> Batch:
    """Indices below ``high``."""

    def batch(step: int, rank: int) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(100 * step + rank)
        return (torch.randint(high, shape, generator=generator),)

    return batch


def frozen(*patterns: str) -> Callable[[nn.Module], None]:
    """Freeze parameters whose fqn contains one of ``patterns``."""

    def prepare(module: nn.Module) -> None:
        for fqn, parameter in module.named_parameters():
            parameter.requires_grad_(not any(pattern in fqn for pattern in patterns))

    return prepare


def evaluating(module: nn.Module) -> None:
    module.eval()


# --- Modules of torch.nn.

show(
    "linear, and a head with fewer outputs than ranks",
    lambda: nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 6, bias=False), nn.Linear(6, 1)),
    floats((B, 3, 5)),
)
show("a linear as the root", lambda: nn.Linear(5, 7), floats((B, 5)))
show(
    "embedding with padding",
    lambda: nn.Sequential(nn.Embedding(11, 5, padding_idx=3), nn.Linear(5, 4)),
    integers(11, B, 6),
)
show(
    "embedding bag", lambda: nn.EmbeddingBag(11, 5, mode="mean", padding_idx=2), integers(11, B, 6)
)
show(
    "convolutions in 1-D",
    lambda: nn.Sequential(
        nn.Conv1d(4, 6, 3, groups=2, padding=1), nn.ReLU(), nn.ConvTranspose1d(6, 4, 3, groups=2)
    ),
    floats((B, 4, 9)),
)
show(
    "convolutions in 2-D",
    lambda: nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding_mode="circular", padding=1),
        nn.Conv2d(6, 6, 3, groups=6, bias=False),
        nn.GELU(),
        nn.ConvTranspose2d(6, 5, 3, dilation=2),
    ),
    floats((B, 3, 8, 8)),
)
show(
    "convolutions in 3-D",
    lambda: nn.Sequential(nn.Conv3d(2, 4, 2, groups=2), nn.Tanh(), nn.ConvTranspose3d(4, 2, 2)),
    floats((B, 2, 4, 4, 4)),
)
show(
    "norms",
    lambda: nn.Sequential(
        nn.GroupNorm(2, 6),
        nn.LayerNorm((6, 5)),
        nn.InstanceNorm1d(6, affine=True),
        nn.RMSNorm(5),
        nn.LayerNorm(5, bias=False),
    ),
    floats((B, 6, 5)),
)
show(
    "batch norm in eval",
    lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
    floats((B, 3, 6, 6)),
    prepare=evaluating,
)
for recurrent in (nn.RNN, nn.LSTM, nn.GRU):
    show(
        f"bidirectional {recurrent.__name__} of two layers",
        lambda recurrent=recurrent: Recurrent(
            recurrent(5, 6, num_layers=2, bidirectional=True, batch_first=True)
        ),
        floats((B, 7, 5)),
    )
show(
    "LSTM with a projection",
    lambda: Recurrent(nn.LSTM(5, 6, num_layers=2, proj_size=3)),
    floats((7, B, 5)),
    batch_dim=1,
)
show("GRU as the root", lambda: nn.GRU(5, 6, bias=False), floats((7, B, 5)), batch_dim=1)
show(
    "LSTM cell in a loop",
    lambda: LoopedCell(nn.LSTMCell(5, 6)),
    floats((B, 4, 5)),
)
show(
    "attention",
    lambda: SelfAttention(nn.MultiheadAttention(8, 2, batch_first=True)),
    floats((B, 5, 8)),
)
show(
    "attention with weights asked for, bias_kv and a zero token",
    lambda: SelfAttention(
        nn.MultiheadAttention(8, 2, add_bias_kv=True, add_zero_attn=True, batch_first=True),
        need_weights=True,
    ),
    floats((B, 5, 8)),
)
show(
    "cross attention with other dimensions, no bias, as the root",
    lambda: nn.MultiheadAttention(8, 4, bias=False, kdim=6, vdim=5, batch_first=True),
    floats((B, 3, 8), (B, 5, 6), (B, 5, 5)),
)
for norm_first in (False, True):
    show(
        f"encoder layer, norm_first={norm_first}",
        lambda norm_first=norm_first: nn.TransformerEncoderLayer(
            8, 2, 12, dropout=0.0, batch_first=True, norm_first=norm_first
        ),
        floats((B, 5, 8)),
    )
show(
    "encoder in eval",
    lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True), 2
    ),
    floats((B, 5, 8)),
    prepare=evaluating,
)
show(
    "decoder",
    lambda: nn.TransformerDecoder(
        nn.TransformerDecoderLayer(8, 2, 12, dropout=0.0, batch_first=True), 2, nn.LayerNorm(8)
    ),
    floats((B, 3, 8), (B, 5, 8)),
)
show(
    "transformer",
    lambda: nn.Transformer(8, 2, 1, 1, 12, dropout=0.0, batch_first=True),
    floats((B, 3, 8), (B, 5, 8)),
)
show("bilinear", lambda: nn.Bilinear(3, 4, 5), floats((B, 3), (B, 4)))
show("prelu", lambda: nn.Sequential(nn.Linear(4, 6), nn.PReLU(6), nn.PReLU()), floats((B, 4)))


class Recurrent(nn.Module):
    """Output and every state matter, and the sequence is read twice in one forward."""

    def __init__(self, inner: nn.RNNBase) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output, _ = self.inner(x)
        again, state = self.inner(x.flip(0 if not self.inner.batch_first else 1))
        states = state if isinstance(state, tuple) else (state,)
        total = sum(part.sum((0, 2)) for part in states)  # [B]
        return output + again * total.view((-1, 1, 1) if self.inner.batch_first else (1, -1, 1))


class LoopedCell(nn.Module):
    def __init__(self, cell: nn.LSTMCell) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = None
        for token in x.unbind(1):
            state = self.cell(token, state)
        assert state is not None
        return state[0] + state[1]


class SelfAttention(nn.Module):
    def __init__(self, inner: nn.MultiheadAttention, need_weights: bool = False) -> None:
        super().__init__()
        self.inner, self.need_weights = inner, need_weights

    def forward(self, x: torch.Tensor) -> Any:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], x.device, x.dtype)
        return self.inner(x, x, x, attn_mask=mask, need_weights=self.need_weights)


# --- Parametrised, tied, shared, frozen and unused layers.

show(
    "parametrised weight norm",
    lambda: nn.Sequential(
        parametrizations.weight_norm(nn.Linear(4, 6)),
        nn.Tanh(),
        parametrizations.weight_norm(nn.Linear(6, 5), dim=1),
    ),
    floats((B, 4)),
)
show(
    "parametrised spectral norm and its power iterations",
    lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 6)), nn.Tanh()),
    floats((B, 4)),
)
show(
    "orthogonal",
    lambda: nn.Sequential(parametrizations.orthogonal(nn.Linear(5, 5)), nn.Tanh()),
    floats((B, 5)),
)
show("a parametrised module as the root", lambda: _symmetric(nn.Linear(5, 5)), floats((B, 5)))


class Symmetric(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.triu() + weight.triu(1).mT


def _symmetric(module: nn.Module) -> nn.Module:
    parametrize.register_parametrization(module, "weight", Symmetric())
    return module


def _old(norm: Callable[..., nn.Module], module: nn.Module) -> nn.Module:
    """Old-style norms compute the weight in a forward pre-hook, from parameters of other names."""
    with warnings.catch_warnings(), torch.no_grad():  # a weight with a graph has no deepcopy
        warnings.simplefilter("ignore", FutureWarning)
        return norm(module)


show(
    "old-style weight norm",
    lambda: nn.Sequential(
        _old(nn.utils.weight_norm, nn.Linear(4, 6)), _old(nn.utils.weight_norm, nn.Linear(6, 3))
    ),
    floats((B, 4)),
)
show(
    "old-style weight norm as the root",
    lambda: _old(nn.utils.weight_norm, nn.Conv1d(4, 6, 3)),
    floats((B, 4, 5)),
)
show(
    "old-style spectral norm",
    lambda: nn.Sequential(nn.Linear(3, 4), _old(nn.utils.spectral_norm, nn.Linear(4, 6))),
    floats((B, 3)),
)


class TiedHead(nn.Module):
    """Embedding and head are one parameter, as in most language models."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.body(self.embedding(tokens))))


show("an embedding tied to the head", TiedHead, integers(11, B, 5))


class ReadsChild(nn.Module):
    """The head has no module of its own: the parent reads its child's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.mix = nn.Linear(6, 6)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.mix(self.embedding(tokens))
        hidden = hidden + F.linear(hidden, self.mix.weight.t(), self.mix.bias)
        return F.linear(hidden, self.embedding.weight)


show("a parent that reads its child's weight", ReadsChild, integers(11, B, 5))


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.Linear(5, 5)
        self.layers = nn.ModuleList([layer, nn.LayerNorm(5), layer])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in [*self.layers, *self.layers]:
            x = torch.tanh(layer(x))
        return x


show("a module used four times, under two names", Shared, floats((B, 5)))


class Unused(nn.Module):
    """Parameters no rank uses, a layer whose output is dropped, and one under ``no_grad``."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)
        self.dropped, self.constant = nn.Conv1d(4, 4, 1), nn.Linear(4, 4)
        self.bare = nn.Parameter(torch.ones(4, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.dropped(x.unsqueeze(-1))
        with torch.no_grad():
            constant = self.constant(x)
        return self.used(x + constant)


show("layers that have no gradient", Unused, floats((B, 4)))
show(
    "a frozen base with adapters",
    lambda: LowRank(nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)), 5, 4),
    floats((B, 5)),
    prepare=frozen("base"),
)
show(
    "a model frozen but for one layer in the middle",
    lambda: nn.Sequential(
        nn.Conv1d(3, 4, 1), nn.LayerNorm(5), nn.Linear(5, 6), nn.LayerNorm(6), nn.Conv1d(4, 3, 1)
    ),
    floats((B, 3, 5)),
    prepare=frozen("0", "1", "3", "4"),
)


class LowRank(nn.Module):
    def __init__(self, base: nn.Module, inputs: int, outputs: int, rank: int = 2) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(rank, inputs))
        self.up = nn.Parameter(torch.randn(outputs, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + F.linear(F.linear(x, self.down), self.up) / len(self.down)


# --- Bare parameters and unusual uses of parameters.


class Bare(nn.Module):
    """Parameters of the model itself, in every number of dimensions, and in containers."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(0.5))
        self.token = nn.Parameter(torch.randn(1, 1, 5))
        self.listed = nn.ParameterList([torch.randn(5), torch.randn(5, 5), torch.randn(5)])
        self.named = nn.ParameterDict({"scale": torch.randn(5), "shift": torch.randn(1)})
        self.register_parameter("absent", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.absent is None
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) * self.temperature.exp()
        first, middle, _ = self.listed
        x = torch.tanh(x * first @ middle + self.listed[-1])
        for each in self.listed[::2]:
            x = x + each
        return x * self.named["scale"] + self.named.shift + len(self.listed)


show("bare parameters, lists and dictionaries of them", Bare, floats((B, 3, 5)))


class Doubled(nn.Linear):
    """Not ``nn.Linear``'s forward, though a subclass."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) + F.linear(input, self.weight**2)


show("a linear with another forward", lambda: nn.Sequential(Doubled(5, 4)), floats((B, 5)))


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return x.square() @ weight

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, weight = ctx.saved_tensors
        return 2 * x * (grad @ weight.t()), x.square().t() @ grad


class UsesFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 5)
        self.weight = nn.Parameter(torch.randn(5, 3) / 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Square.apply(self.inner(x), self.weight)


show("an autograd function that saves a weight", UsesFunction, floats((B, 5)))


def _scale_input(module: nn.Linear, arguments: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    return (arguments[0] * module.weight.mean(0),)


def _scale_output(module: nn.Linear, _: Any, output: torch.Tensor) -> torch.Tensor:
    return output * module.weight.mean(1) + module.bias


def _with_hooks(linear: nn.Linear) -> nn.Linear:
    linear.register_forward_pre_hook(_scale_input)
    linear.register_forward_hook(_scale_output)
    return linear


show(
    "hooks that read weights",
    lambda: nn.Sequential(_with_hooks(nn.Linear(5, 4)), nn.Tanh(), _with_hooks(nn.Linear(4, 3))),
    floats((B, 5)),
)
show("hooks of the root that read weights", lambda: _with_hooks(nn.Linear(5, 4)), floats((B, 5)))


def _patched_forward(self: nn.Linear, input: torch.Tensor) -> torch.Tensor:
    return F.linear(input, self.weight * 2, self.bias)


def _patched(linear: nn.Linear) -> nn.Linear:
    linear.forward = types.MethodType(_patched_forward, linear)
    return linear


show(
    "a forward patched into an object",
    lambda: nn.Sequential(_patched(nn.Linear(5, 4)), nn.Tanh(), nn.Linear(4, 3)),
    floats((B, 5)),
)
show("a forward patched into the root", lambda: _patched(nn.Linear(5, 4)), floats((B, 5)))


class Skips(nn.Module):
    """Layers at random, the same ones on all ranks; slices of containers; a call to ``forward``."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(5, 5) for _ in range(3)])
        self.stack = nn.Sequential(
            OrderedDict(first=nn.Linear(5, 5), act=nn.Tanh(), second=nn.Conv1d(1, 1, 1))
        )

    def forward(self, x: torch.Tensor, seed: int) -> torch.Tensor:
        draw = random.Random(seed)
        for layer in self.layers[: draw.randint(1, 3)]:
            if draw.random() < 0.6:
                x = torch.tanh(layer.forward(x))
        return self.stack[1:](self.stack[:1](x).unsqueeze(1)).squeeze(1)


show(
    "random depth", Skips, lambda step, rank: (*floats((B, 5))(step, rank), step), prepare=frozen()
)


class Recursive(nn.Module):
    """Calls itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 5) / 3)

    def forward(self, x: torch.Tensor, depth: int = 2) -> torch.Tensor:
        x = torch.tanh(x @ self.weight)
        return self(x, depth - 1) @ self.weight if depth else x


show("a module that calls itself", Recursive, floats((B, 5)))


class NoParameters(nn.Module):
    """Nothing to train in the middle of the model; tuples and dictionaries go through."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 4)
        self.flip = nn.Identity()

    def forward(self, x: torch.Tensor) -> Any:
        result = {"y": self.flip(self.inner(x))}
        return result["y"], (x.sum(1), None)


show("structured outputs", NoParameters, floats((B, 5)))
show(
    "a traced graph module",
    lambda: symbolic_trace(nn.Sequential(nn.Linear(5, 4), nn.Tanh(), UsesBare())),
    floats((B, 5)),
)


class UsesBare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


# --- The promises.


def _check_exhibit(name: str) -> None:
    build, batch, options = ZOO[name]
    wrappings = (
        list(WRAPPINGS) if THOROUGH else SELECTED.get(dist.get_world_size(), list(WRAPPINGS))
    )
    for wrapping in wrappings:
        try:
            wrapped = check_parity(build, batch, steps=2, **options, **WRAPPINGS[wrapping])
            _check_evaluation(wrapped, batch)
        except BaseException as error:
            error.add_note(f"{name}, {wrapping}")
            raise


def _check_evaluation(wrapped: RotatedTensorParallel, batch: Batch) -> None:
    """The same outputs with and without gradients: torch has faster code for the latter."""
    wrapped.eval()
    arguments = [
        each.to(device(), torch.float64 if each.is_floating_point() else each.dtype)
        if isinstance(each, torch.Tensor)
        else each
        for each in batch(0, dist.get_rank())
    ]
    expected = wrapped(*arguments)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            torch.testing.assert_close(wrapped(*arguments), expected, **FP64)


@all_world_sizes
@pytest.mark.parametrize("name", ZOO)
def test_every_module_trains_like_the_dense_one(world_size: int, name: str) -> None:
    run_ranks(world_size, _check_exhibit, name)


def _check_running_statistics(norm: str) -> None:
    rank = dist.get_rank()
    torch.manual_seed(0)
    dense = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        NORMS[norm](4),
        nn.ReLU(),
        nn.BatchNorm2d(4, affine=False, momentum=None),  # no parameter, and a cumulative mean
    ).to(device(), torch.float64)
    theirs = DistributedDataParallel(deepcopy(dense))  # as it comes: broadcast_buffers=True
    ours = RotatedTensorParallel(dense, policy=SHARDED)
    optimizers = sgd(theirs.parameters()), sgd(ours.parameters())

    def compare_buffers(when: str) -> None:
        for (fqn, their), (_, our) in zip(
            theirs.module.named_buffers(), ours.named_buffers(), strict=True
        ):
            torch.testing.assert_close(our, their, **FP64, msg=f"{when}: {fqn}")

    for step in range(3):
        (x,) = floats((B, 3, 6, 6))(step, rank)
        x = (1 + rank) * x.to(device(), torch.float64)
        outputs = []
        for model, optimizer in zip((theirs, ours), optimizers, strict=True):
            optimizer.zero_grad()
            outputs.append(model(x))
            mean_square(outputs[-1]).backward()
            optimizer.step()
        torch.testing.assert_close(outputs[1], outputs[0], **FP64)
        compare_gradients(theirs.module, ours, FP64, f"step {step}")
        compare_weights(theirs.module, ours, FP64, f"step {step}")
        compare_buffers(f"step {step}")
    theirs.eval()
    ours.eval()
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(ours(x), theirs(x), **FP64)
        compare_buffers("evaluation")  # now every rank has rank 0's


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "instance": lambda width: nn.InstanceNorm2d(width, affine=True, track_running_stats=True),
}


@multi_world_sizes
@pytest.mark.parametrize("norm", NORMS)
def test_running_statistics_are_as_under_ddp(world_size: int, norm: str) -> None:
    run_ranks(world_size, _check_running_statistics, norm)


def _check_statistics_between_backwards() -> None:
    """Two forwards before a backward, which DDP's exchange of buffers does not survive."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4))
    model = RotatedTensorParallel(model.to(device(), torch.float64), policy=SHARDED)
    inputs = [floats((B, 3, 6))(step, dist.get_rank())[0] for step in range(2)]
    first, second = (mean_square(model(x.to(device(), torch.float64))) for x in inputs)
    (first + second).backward()
    copy = deepcopy(model)
    copy(inputs[0].to(device(), torch.float64))
    own = [copy.get_buffer("1.running_mean"), model.get_buffer("1.running_mean")]
    assert not torch.equal(*own)  # a copy's statistics are its own


@multi_world_sizes
def test_statistics_may_change_between_a_forward_and_its_backward(world_size: int) -> None:
    run_ranks(world_size, _check_statistics_between_backwards)


def _check_sync_batch_norm() -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    check_parity(
        # In one process on the whole batch, the plain one: that is what it synchronises to.
        lambda: deepcopy(dense),
        floats((B, 3, 6, 6)),
        convert=nn.SyncBatchNorm.convert_sync_batchnorm,
        policy=SHARDED,
    )


@pytest.mark.skipif(DEVICE_TYPE == "cpu", reason="torch's SyncBatchNorm needs GPUs")
@multi_world_sizes
def test_sync_batch_norm_normalises_the_whole_batch(world_size: int) -> None:
    run_ranks(world_size, _check_sync_batch_norm)


class Language(nn.Module):
    """A model whose users call more than ``forward``."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.mix = nn.Conv1d(6, 6, 1)
        self.head = nn.Linear(6, 11)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.hidden(tokens))

    def hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.mix(self.embedding(tokens).mT).mT)

    def training_loss(self, tokens: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    @torch.no_grad()
    def generate(self, tokens: torch.Tensor, count: int) -> torch.Tensor:
        for _ in range(count):
            tokens = torch.cat([tokens, self(tokens)[:, -1:].argmax(-1)], 1)
        return tokens


def _check_entries(policy: ShardingPolicy) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    dense = Language().to(device(), torch.float64)
    inner = deepcopy(dense)
    wrapped = RotatedTensorParallel(inner, policy=policy)
    losses: list[Callable[[Any, torch.Tensor], torch.Tensor]] = [
        lambda model, tokens: model.training_loss(tokens),
        lambda model, tokens: mean_square(model.head(model.hidden(tokens))),
        lambda model, tokens: mean_square(model.mix(model.embedding(tokens).mT)),
    ]
    for model in (wrapped, inner):
        for loss in losses:
            parts = [integers(11, B, 5)(0, r)[0].to(device()) for r in range(world_size)]
            dense.zero_grad()
            wrapped.zero_grad()
            loss(dense, torch.cat(parts)).backward()
            loss(model, parts[rank]).backward()
            compare_gradients(dense, wrapped)
        torch.testing.assert_close(model.generate(parts[rank], 3), dense.generate(parts[rank], 3))


@all_world_sizes
@pytest.mark.parametrize("policy", [SHARDED, ShardingPolicy()], ids=["sharded", "default"])
def test_any_module_or_method_can_be_the_entry(world_size: int, policy: ShardingPolicy) -> None:
    run_ranks(world_size, _check_entries, policy)
