"""What a wrapped model promises for every way of training: the results of the dense model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from itertools import islice
from typing import Any

import pytest

if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from rtp_wrap import Gather, Replicate, Rotate, RotatedTensorParallel, ShardingPolicy
from rtp_wrap.shard import extent
from tests.parity import FP64, check_parity, compare_gradients, compare_weights, full, sgd
from tests.ranks import all_world_sizes, device, multi_world_sizes, run_ranks
from tests.rotated import by_ring

#: Everything sharded, uneven sizes included: 7 and 10 do not divide by 2, 3 and 4.
ROTATE = ShardingPolicy(replicate_below=0)
#: The three strategies in one model.
MIXED = ShardingPolicy(
    rules={"up.weight": Rotate(dim=1), "down": Gather(), "*": Replicate()}, replicate_below=0
)

Pass = Callable[[nn.Module, torch.Tensor], None]


class Net(nn.Module):
    """Three linears, of which the middle one may be used any number of times."""

    def __init__(self, repeats: int = 1) -> None:
        super().__init__()
        self.up = nn.Linear(6, 7)
        self.mid = nn.Linear(7, 7)
        self.norm = nn.LayerNorm(7)
        self.down = nn.Linear(7, 10)
        self.spare = nn.Linear(3, 5)  # used by no rank
        self.repeats = repeats

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.up(x)
        for _ in range(self.repeats):
            x = torch.tanh(self.mid(x))
        return self.down(self.norm(x))


class Tied(nn.Module):
    """An embedding whose weight is that of the head, and two linears with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6, bias=False)
        self.head = nn.Linear(6, 11, bias=False)
        self.second.weight = self.first.weight
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ids = (x * 1000).long().remainder(11)
        return self.head(self.second(torch.tanh(self.first(self.embed(ids)))))


def pair(
    build: Callable[[], nn.Module] = Net, dtype: torch.dtype = torch.float64, **wrap: Any
) -> tuple[nn.Module, RotatedTensorParallel]:
    """A dense model, and a wrapped copy of which only rank 0 had the right weights."""
    torch.manual_seed(0)
    dense = build().to(device(), dtype)
    mine = deepcopy(dense)
    with torch.no_grad():
        for parameter in mine.parameters():
            parameter.add_(dist.get_rank())
    wrap.setdefault("policy", ROTATE)
    return dense, RotatedTensorParallel(mine, **wrap)


def data(step: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """The whole batch, and this rank's part of it."""
    generator = torch.Generator().manual_seed(step)
    whole = torch.randn(4 * dist.get_world_size(), 6, generator=generator, dtype=dtype)
    whole = whole.to(device())
    return whole, whole.chunk(dist.get_world_size())[dist.get_rank()]


def mean_square(y: torch.Tensor) -> torch.Tensor:
    return (y - 0.5).square().mean()


def check(
    pass_: Pass,
    build: Callable[[], nn.Module] = Net,
    prepare: Callable[[nn.Module], None] = lambda model: None,
    **wrap: Any,
) -> None:
    """Both models make the same steps, each of whose gradients ``pass_`` accumulates."""

    def prepared() -> nn.Module:
        model = build()
        prepare(model)
        return model

    dense, wrapped = pair(prepared, **wrap)
    optimizers = [sgd(dense.parameters()), sgd(wrapped.parameters())]
    for step in range(2):
        for model, x in zip((dense, wrapped), data(step), strict=True):
            pass_(model, x)
        compare_gradients(dense, wrapped, FP64, f"step {step}")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        compare_weights(dense, wrapped, FP64, f"step {step}")


# Passes: ways to come to gradients.


def plain(model: nn.Module, x: torch.Tensor) -> None:
    mean_square(model(x)).backward()


def accumulating(model: nn.Module, x: torch.Tensor) -> None:
    for part in (x, x.flip(0) * 2, x + 1):
        mean_square(model(part)).backward()


def two_forwards_first(model: nn.Module, x: torch.Tensor) -> None:
    first, second = model(x), model(x * 2)
    mean_square(first).backward()
    mean_square(second).backward()


def one_loss_of_two_forwards(model: nn.Module, x: torch.Tensor) -> None:
    (mean_square(model(x)) + mean_square(model(x * 2))).backward()


def into_itself(model: nn.Module, x: torch.Tensor) -> None:
    mean_square(model(model(x)[..., :6])).backward()


def evaluating_between(model: nn.Module, x: torch.Tensor) -> None:
    y = model(x)
    model.eval()
    with torch.no_grad():
        model(x * 3)
    with torch.inference_mode():
        model(x * 4)
    model.train()
    mean_square(y).backward()
    with torch.inference_mode():
        model(x)


def retaining(model: nn.Module, x: torch.Tensor) -> None:
    loss = mean_square(model(x))
    loss.backward(retain_graph=True)
    loss.backward()


def by_autograd_grad(model: nn.Module, x: torch.Tensor) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(mean_square(model(x)), parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient


def of_some_parameters(model: Any, x: torch.Tensor) -> None:
    """Gradients of one weight only, then of all."""
    loss = mean_square(model(x))
    (gradient,) = torch.autograd.grad(loss, [model.mid.weight], retain_graph=True)
    loss.backward()
    model.mid.weight.grad += gradient


def into_chosen_leaves(model: Any, x: torch.Tensor) -> None:
    """Into one weight only, then into all."""
    loss = mean_square(model(x))
    loss.backward(inputs=[model.mid.weight], retain_graph=True)
    there = [name for name, each in model.named_parameters() if each.grad is not None]
    assert there == ["mid.weight"]
    loss.backward()


def freezing_between(model: Any, x: torch.Tensor) -> None:
    """Autograd goes by what a weight is when its gradient comes."""
    loss = mean_square(model(x))
    model.mid.weight.requires_grad_(False)
    loss.backward(retain_graph=True)
    assert model.mid.weight.grad is None
    model.mid.weight.requires_grad_(True)
    loss.backward()


def with_input_gradient(model: nn.Module, x: torch.Tensor) -> None:
    x = x.clone().requires_grad_()
    y = model(x)
    (dx,) = torch.autograd.grad(y.square().sum(), x, retain_graph=True)
    # A loss of the input's gradient as a number: it must be the dense one's to have equal steps.
    (mean_square(y) * 1.0 + (y * dx.detach().sum(-1, keepdim=True)).mean()).backward()


def checkpointed(model: nn.Module, x: torch.Tensor) -> None:
    mean_square(checkpoint(model, x, use_reentrant=False)).backward()


def checkpointed_reentrant(model: nn.Module, x: torch.Tensor) -> None:
    y = checkpoint(model, x.clone().requires_grad_(), use_reentrant=True)
    mean_square(y).backward()


def clipping(model: nn.Module, x: torch.Tensor) -> None:
    mean_square(model(x) * 10).backward()
    norm = full(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1))
    mean_square(model(x * float(norm))).backward()  # puts the norm into what is compared
    torch.nn.utils.clip_grad_value_(model.parameters(), 0.01)


def freeze_some(model: Any) -> None:
    model.mid.requires_grad_(False)
    model.down.bias.requires_grad_(False)


def freeze_first(model: Any) -> None:
    model.up.requires_grad_(False)


CASES: dict[str, dict[str, Any]] = {
    "plain": {"pass_": plain},
    "inplace": {"pass_": plain, "inplace": True},
    "mixed strategies": {"pass_": plain, "policy": MIXED},
    "default policy": {"pass_": plain, "policy": None},
    "tiny staging": {
        "pass_": plain,
        "policy": ShardingPolicy(replicate_below=0, staging_bytes=1024),
    },
    "accumulation": {"pass_": accumulating},
    "accumulation, mixed": {"pass_": accumulating, "policy": MIXED},
    "two forwards first": {"pass_": two_forwards_first},
    "two forwards first, mixed": {"pass_": two_forwards_first, "policy": MIXED},
    "one loss of two forwards": {"pass_": one_loss_of_two_forwards, "policy": MIXED},
    "model of its own output": {"pass_": into_itself},
    "evaluation between": {"pass_": evaluating_between},
    "evaluation between, mixed": {"pass_": evaluating_between, "policy": MIXED},
    "module used thrice": {"pass_": plain, "build": lambda: Net(3)},
    "module used thrice, mixed": {"pass_": plain, "build": lambda: Net(3), "policy": MIXED},
    "layer unused": {"pass_": plain, "build": lambda: Net(0)},
    "tied": {"pass_": plain, "build": Tied},
    "tied, gathered": {"pass_": plain, "build": Tied, "policy": {"*": Gather()}},
    "tied, accumulating": {"pass_": two_forwards_first, "build": Tied},
    "frozen": {"pass_": plain, "prepare": freeze_some},
    "frozen, mixed": {"pass_": plain, "prepare": freeze_some, "policy": MIXED},
    "frozen first": {"pass_": plain, "prepare": freeze_first, "inplace": True},
    "frozen, checkpointed": {"pass_": checkpointed, "prepare": freeze_first},
    "frozen between": {"pass_": freezing_between},
    "retain_graph": {"pass_": retaining},
    "retain_graph, mixed": {"pass_": retaining, "policy": MIXED},
    "autograd.grad": {"pass_": by_autograd_grad},
    "autograd.grad, mixed": {"pass_": by_autograd_grad, "policy": MIXED},
    "autograd.grad of one": {"pass_": of_some_parameters},
    "into chosen leaves": {"pass_": into_chosen_leaves},
    "checkpointing": {"pass_": checkpointed},
    "checkpointing, mixed": {"pass_": checkpointed, "policy": MIXED},
    "reentrant checkpointing": {"pass_": checkpointed_reentrant},
    "clipping": {"pass_": clipping},
    "clipping, mixed": {"pass_": clipping, "policy": MIXED},
}


def _check_cases(names: list[str]) -> None:
    for name in names:
        case = dict(CASES[name])
        case["policy"] = case.get("policy", ROTATE)
        try:
            check(**case)
        except Exception as error:
            raise AssertionError(f"case {name!r}") from error


@all_world_sizes
@pytest.mark.parametrize("group", sorted({name.split(",")[0] for name in CASES}))
def test_every_way_of_training_gives_the_dense_results(world_size: int, group: str) -> None:
    run_ranks(world_size, _check_cases, [name for name in CASES if name.split(",")[0] == group])


def _batch(step: int, rank: int) -> tuple[torch.Tensor]:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return (torch.randn(4, 6, generator=generator, dtype=torch.float64),)


def _averaged() -> None:
    check_parity(Net, _batch, policy=ROTATE)
    check_parity(Net, _batch, policy=MIXED, inplace=True)


@all_world_sizes
def test_gradients_are_averaged_and_weights_are_those_of_rank_0(world_size: int) -> None:
    run_ranks(world_size, _averaged)


def _input_gradients() -> None:
    dense, wrapped = pair()
    whole, own = data(0)
    whole, own = whole.clone().requires_grad_(), own.clone().requires_grad_()
    dense(whole).square().sum().backward()
    wrapped(own).square().sum().backward()
    assert whole.grad is not None
    expected = whole.grad.chunk(dist.get_world_size())[dist.get_rank()]
    torch.testing.assert_close(own.grad, expected, **FP64)


@all_world_sizes
def test_input_gradients_are_this_ranks_own(world_size: int) -> None:
    run_ranks(world_size, _input_gradients)


def _home_shards() -> None:
    _, wrapped = pair(policy=MIXED)
    optimizer = torch.optim.AdamW(wrapped.parameters())
    parameters = dict(wrapped.named_parameters())
    local = {fqn: _local(p) for fqn, p in parameters.items()}
    addresses = {fqn: tensor.data_ptr() for fqn, tensor in local.items()}
    before = {fqn: tensor.clone() for fqn, tensor in local.items()}

    def check_unmoved() -> None:
        for fqn, parameter in wrapped.named_parameters():
            assert parameter is parameters[fqn], fqn
            assert _local(parameter).data_ptr() == addresses[fqn], fqn

    for step in range(2):
        y = wrapped(data(step)[1])
        for fqn, value in before.items():
            assert torch.equal(_local(parameters[fqn]), value), f"{fqn} after a forward"
        mean_square(y).backward()
        for fqn, value in before.items():
            assert torch.equal(_local(parameters[fqn]), value), f"{fqn} after a backward"
        check_unmoved()
        optimizer.step()
        check_unmoved()
        before = {fqn: _local(p).clone() for fqn, p in parameters.items()}


def _local(tensor: Any) -> torch.Tensor:
    local: torch.Tensor = tensor._local_tensor
    return local


@all_world_sizes
def test_home_shards_never_move(world_size: int) -> None:
    run_ranks(world_size, _home_shards)


class _Peak(torch.utils._python_dispatch.TorchDispatchMode):
    """Remembers the largest tensor that any operation made or took a view of, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and type(result) is torch.Tensor:
            self.nbytes = max(self.nbytes, result.nbytes)
        return result


@by_ring  # peers have the parts of a whole cell in the staging
def _one_over_n() -> None:
    _, wrapped = pair(lambda: nn.Sequential(nn.Linear(6, 96), nn.Tanh(), nn.Linear(96, 64)))
    weight: Any = wrapped[2].weight
    for step in range(2):  # the second one accumulates
        y = wrapped(data(step)[1])
        with _Peak() as peak:
            mean_square(y).backward()
        grad: Any = weight.grad
        assert _local(grad).shape == _local(weight).shape
        start, stop = extent(64, dist.get_world_size(), dist.get_rank())
        assert _local(weight).shape == (stop - start, 96)
        # The largest things in backward are a shard and a slot of the staging.
        assert peak.nbytes <= weight.nbytes // 2 + 256, f"{peak.nbytes} bytes in backward"


@multi_world_sizes
def test_gradients_are_never_more_than_one_nth(world_size: int) -> None:
    run_ranks(world_size, _one_over_n)


def _modes() -> None:
    dense, wrapped = pair(policy=MIXED)
    whole, own = data(0)
    expected = dense(whole).chunk(dist.get_world_size())[dist.get_rank()]
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        for training in (True, False):
            wrapped.train(training)
            with mode():
                torch.testing.assert_close(wrapped(own), expected, **FP64)
    with torch.inference_mode():
        y = wrapped(own)
    assert y.is_inference()
    assert not wrapped(own).is_inference()
    assert wrapped(own).requires_grad


@all_world_sizes
def test_forwards_are_the_same_in_every_mode(world_size: int) -> None:
    run_ranks(world_size, _modes)


def _autocast() -> None:
    for policy in (ROTATE, MIXED):
        dense, wrapped = pair(dtype=torch.float32, policy=policy)
        whole, own = data(0, torch.float32)
        with torch.autocast(device().type, torch.bfloat16):
            expected, y = dense(whole), wrapped(own)
            mean_square(expected.float()).backward()
            mean_square(y.float()).backward()
        assert y.dtype == expected.dtype == torch.bfloat16
        # bf16 has 8 bits: results of a few layers differ by a few units of 2**-8 where the
        # GEMMs of different sizes round differently, and gradients sum up that of all samples.
        expected = expected.chunk(dist.get_world_size())[dist.get_rank()]
        torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05)
        compare_gradients(dense, wrapped, {"rtol": 0.05, "atol": 0.02})
        assert all(p.dtype == torch.float32 for p in wrapped.parameters())
        assert all(p.grad is None or p.grad.dtype == torch.float32 for p in wrapped.parameters())


@all_world_sizes
def test_autocast_computes_in_its_dtype_and_keeps_parameters(world_size: int) -> None:
    run_ranks(world_size, _autocast)


def _deep_copies() -> None:
    dense, wrapped = pair(policy=MIXED)
    copied = deepcopy(wrapped)
    optimizers = [sgd(model.parameters()) for model in (dense, copied)]
    initial = [_local(p).clone() for p in wrapped.parameters()]
    for step in range(2):
        for model, x in zip((dense, copied), data(step), strict=True):
            plain(model, x)
        compare_gradients(dense, copied)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        compare_weights(dense, copied)
    for parameter, value in zip(wrapped.parameters(), initial, strict=True):
        assert torch.equal(_local(parameter), value), "training the copy changed the original"
        assert parameter.grad is None
    plain(wrapped, data(0)[1])  # and the original still trains


@all_world_sizes
def test_a_deep_copy_trains_on_its_own(world_size: int) -> None:
    run_ranks(world_size, _deep_copies)


def _writers(model: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Ways to write weights while a graph waits for its backward."""

    def in_place() -> None:
        with torch.no_grad():
            model.up.weight.mul_(0.9)
            model.mid.weight.mul_(0.9)
            model.down.weight.mul_(0.9)

    def step(make: Callable[..., torch.optim.Optimizer], **options: Any) -> Callable[[], Any]:
        optimizer = make(model.parameters(), **options)
        return optimizer.step

    yield "an in-place operation", in_place
    yield "load_state_dict", lambda: model.load_state_dict(model.state_dict())
    for options in ({"foreach": True}, {"fused": True}, {"foreach": False, "fused": False}):
        yield f"AdamW {options}", step(torch.optim.AdamW, lr=0.1, **options)
    yield "SGD", step(torch.optim.SGD, lr=0.1)


#: Of replicated parameters, whose memory autograd saves as it is, torch may be the first to tell.
WRITTEN = r"was written .* between a forward and|modified by an in-?place operation"


def _written() -> None:
    for policy in (ROTATE, MIXED, ShardingPolicy(rules={"*": Replicate()})):
        wrapped = pair(dtype=torch.float32, policy=policy)[1]
        # What a copy and another dtype change is not how the optimizers write.
        for prepare, ways in ((nn.Module.float, None), (deepcopy, 3), (nn.Module.double, 3)):
            model = prepare(wrapped)
            x = data(0, next(model.parameters()).dtype)[1]
            for how, write in islice(_writers(model), ways):
                plain(model, x)  # gradients for the optimizers
                y = model(x)
                write()
                with pytest.raises(RuntimeError, match=WRITTEN):
                    mean_square(y).backward()
                plain(model, x)  # after the error the next step is as good as ever
                assert how


@all_world_sizes
def test_weights_written_between_a_forward_and_its_backward_are_an_error(world_size: int) -> None:
    run_ranks(world_size, _written)


def _double_backward() -> None:
    for policy in (ROTATE, {"*": Gather()}, {"*": Replicate()}):
        _, wrapped = pair(policy=policy)
        x = data(0)[1].clone().requires_grad_()
        # One rank has nothing to rotate and nothing to refuse in the linears themselves.
        if dist.get_world_size() > 1 or policy is not ROTATE:
            parameters = [p for n, p in wrapped.named_parameters() if not n.startswith("spare")]
            with pytest.raises(RuntimeError, match=r"double backward .*is not supported"):
                torch.autograd.grad(mean_square(wrapped(x)), parameters, create_graph=True)
        plain(wrapped, x)


@all_world_sizes
def test_double_backward_is_refused_clearly(world_size: int) -> None:
    with warnings.catch_warnings():
        # torch warns of reference cycles that create_graph makes; nothing is left of them here.
        warnings.filterwarnings("ignore", "Using backward.. with create_graph=True")
        run_ranks(world_size, _double_backward)
