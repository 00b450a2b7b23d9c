"""The wrapper is transparent: what worked with the model works with the wrapped one."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest

if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from rtp_wrap import Gather, OutOfStepError, Rotate, RotatedTensorParallel, ShardingPolicy
from tests.parity import FP64, check_parity, full
from tests.ranks import DEVICE_TYPE, all_world_sizes, device, multi_world_sizes, run_ranks

ROTATE = ShardingPolicy(replicate_below=0)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.linear = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear(self.norm(x))


class Model(nn.Module):
    """Attributes, methods, buffers and overridden methods, as models in the wild have them."""

    temperature = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(6, 3)
        self.gain = nn.Parameter(torch.ones(3))
        self.register_buffer("shift", torch.full((3,), 0.5))
        self.register_buffer("mask", torch.ones(3), persistent=False)
        self.config = {"layers": 2}

    def features(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        y = self.head(self.features(x)) * self.gain + self.shift * self.mask
        return y * scale / self.temperature

    def train(self, mode: bool = True) -> Model:
        """As fine-tuning with frozen statistics does."""
        super().train(mode)
        self.blocks[0].norm.eval()
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Model:
        """As modules do that keep tensors of their own, such as recurrent ones."""
        super()._apply(fn, recurse)
        self.conversions = getattr(self, "conversions", 0) + 1
        return self


def _models() -> tuple[Any, Any, torch.Tensor]:
    """A dense model in eval mode, the same wrapped, and an input."""
    torch.manual_seed(0)
    dense = Model().to(device(), torch.float64).eval()
    wrapped = RotatedTensorParallel(deepcopy(dense), policy=ROTATE)
    return dense, wrapped, torch.randn(4, 6, dtype=torch.float64, device=device())


def _same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, **FP64)


def _names() -> None:
    dense, wrapped, _ = _models()
    for listing in ("named_parameters", "named_buffers", "named_children"):
        ours, theirs = (list(getattr(model, listing)()) for model in (wrapped, dense))
        assert [name for name, _ in ours] == [name for name, _ in theirs], listing
    for listing in ("state_dict", "named_modules"):
        ours, theirs = (list(dict(getattr(model, listing)())) for model in (wrapped, dense))
        assert ours == theirs, listing
    for ours, theirs in zip(wrapped.parameters(), dense.parameters(), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        assert ours.requires_grad == theirs.requires_grad
        assert isinstance(ours, nn.Parameter)
    assert len(list(wrapped.buffers())) == len(list(dense.buffers()))
    assert "wrapping Model" in repr(wrapped)


@all_world_sizes
def test_fqns_order_and_shapes_are_the_models_own(world_size: int) -> None:
    run_ranks(world_size, _names)


def _attributes() -> None:
    dense, wrapped, x = _models()
    assert wrapped.config is wrapped.module.config
    assert wrapped.temperature == 1.0
    _same(wrapped.features(x), dense.features(x))
    _same(wrapped(x, scale=3.0), dense(x, scale=3.0))
    _same(wrapped(x=x), dense(x))
    wrapped.temperature = dense.temperature = 2.0
    assert wrapped.module.temperature == 2.0
    _same(wrapped(x), dense(x))
    del wrapped.temperature
    assert wrapped.temperature == 1.0
    wrapped.extra = nn.Identity()
    assert wrapped.module.extra is wrapped.extra
    wrapped.mask = torch.zeros(3, dtype=torch.float64, device=device())
    assert wrapped.module._buffers["mask"] is wrapped.mask
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = wrapped.nothing_of_the_kind
    assert not hasattr(wrapped, "nothing_of_the_kind")


@all_world_sizes
def test_attributes_and_methods_of_the_model_are_reachable_and_can_be_set(world_size: int) -> None:
    run_ranks(world_size, _attributes)


def _own_methods() -> None:
    _, wrapped, _ = _models()
    assert wrapped.training is False
    assert wrapped.train() is wrapped
    assert wrapped.training is True
    assert wrapped.module.training is True
    assert wrapped.blocks[0].norm.training is False, "the model's own train() did not run"
    assert wrapped.blocks[1].norm.training is True
    assert wrapped.eval() is wrapped
    assert not any(module.training for module in (wrapped.module, *wrapped.modules()))
    wrapped.training = True
    assert wrapped.module.training is True
    seen: list[nn.Module] = []
    assert wrapped.apply(seen.append) is wrapped
    assert wrapped.module in seen
    assert wrapped.requires_grad_(False) is wrapped
    assert not any(p.requires_grad for p in wrapped.parameters())
    wrapped.requires_grad_(True)
    for parameter in wrapped.parameters():
        parameter.grad = torch.zeros_like(parameter)
    wrapped.conversions = 0
    assert wrapped.double() is wrapped
    assert wrapped.conversions == 1
    wrapped.zero_grad()
    assert all(parameter.grad is None for parameter in wrapped.parameters())
    assert wrapped.get_parameter("blocks.0.linear.weight") is wrapped.blocks[0].linear.weight
    assert wrapped.get_parameter("gain") is wrapped.gain
    assert wrapped.get_submodule("blocks.1") is wrapped.module.blocks[1]
    wrapped.register_buffer("late", torch.zeros(1))
    assert wrapped.module.late is wrapped.late
    assert "late" in wrapped.state_dict()


@all_world_sizes
def test_methods_of_nn_module_are_those_of_the_model(world_size: int) -> None:
    run_ranks(world_size, _own_methods)


class Around(nn.Module):
    """A model with a child of the name that the wrapper uses."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x)


def _shapes_of_models() -> None:
    x = torch.randn(2, 6, dtype=torch.float64, device=device())
    around = RotatedTensorParallel(Around().to(device(), torch.float64), policy=ROTATE)
    assert [name for name, _ in around.named_parameters()] == ["module.weight", "module.bias"]
    assert around.get_parameter("module.weight").shape == (3, 6)
    assert around.get_submodule("module") is around.module.module
    around(x).sum().backward()

    dense = nn.Linear(6, 3).to(device(), torch.float64)
    root = RotatedTensorParallel(deepcopy(dense), policy=ROTATE)
    with torch.no_grad():
        for ours, theirs in zip(root.parameters(), dense.parameters(), strict=True):
            theirs.copy_(full(ours))
    _same(root(x), dense(x))
    assert root.in_features == 6

    sequence = RotatedTensorParallel(nn.Sequential(nn.Linear(6, 3), nn.ReLU()), policy=ROTATE)
    assert sequence[0] is sequence.module[0]
    assert [type(each) for each in sequence[-1:]] == [nn.ReLU]
    assert isinstance(list(sequence)[1], nn.ReLU)
    for empty in (nn.Identity(), nn.Sequential()):
        assert list(RotatedTensorParallel(empty).parameters()) == []


@all_world_sizes
def test_a_model_may_be_one_layer_a_sequence_empty_or_have_a_child_named_module(
    world_size: int,
) -> None:
    run_ranks(world_size, _shapes_of_models)


def _hooks() -> None:
    _, wrapped, x = _models()
    calls: list[str] = []
    wrapped.register_forward_pre_hook(lambda *_: calls.append("wrapper pre"))
    wrapped.register_forward_hook(lambda *_: calls.append("wrapper"))
    wrapped.head.register_forward_hook(lambda *_: calls.append("head"))
    wrapped.head.register_full_backward_hook(lambda *_: calls.append("head backward"))
    wrapped.register_full_backward_hook(lambda *_: calls.append("wrapper backward"))
    wrapped.register_state_dict_post_hook(lambda *_: calls.append("state_dict"))
    wrapped.register_load_state_dict_pre_hook(lambda *_: calls.append("load pre"))
    wrapped.register_load_state_dict_post_hook(lambda *_: calls.append("load post"))
    wrapped(x.requires_grad_()).sum().backward()
    wrapped.load_state_dict(wrapped.state_dict())
    assert calls == [
        "wrapper pre",
        "head",
        "wrapper",
        "head backward",
        "wrapper backward",
        "state_dict",
        "load pre",
        "load post",
    ]


@all_world_sizes
def test_hooks_run_on_the_wrapper_and_on_modules_once_each(world_size: int) -> None:
    run_ranks(world_size, _hooks)


def _hooks_before() -> None:
    model = Model().to(device(), torch.float64)
    calls: list[str] = []
    model.register_forward_hook(lambda *_: calls.append("root"))
    model.head.register_forward_pre_hook(lambda *_: calls.append("head"))
    before = {name: (module, type(module)) for name, module in model.named_modules()}
    kept, state = model.blocks[1], vars(model.blocks[1].linear)
    wrapped = RotatedTensorParallel(model, policy=ROTATE)
    for name, (module, kind) in before.items():
        assert isinstance(module, kind)
        assert type(module).__name__ == kind.__name__
        assert model.get_submodule(name) is module
    assert wrapped.module is model
    assert wrapped.blocks[1] is kept
    assert vars(kept.linear) is state
    wrapped(torch.randn(4, 6, dtype=torch.float64, device=device()))
    assert calls == ["head", "root"]


@all_world_sizes
def test_modules_are_adopted_in_place(world_size: int) -> None:
    run_ranks(world_size, _hooks_before)


class Larger(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(self.first(x))


def _larger() -> None:
    dense, wrapped, x = _models()
    ours, theirs = (Larger(inner).to(device(), torch.float64) for inner in (wrapped, dense))
    ours.first.load_state_dict(theirs.first.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert ours.inner is wrapped
    _same(ours(x), theirs(x))
    state = {name: value.clone() for name, value in ours.state_dict().items()}
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    assert ours.load_state_dict(state).missing_keys == []
    _same(ours(x), theirs(x))
    ours.train()
    assert wrapped.module.training
    assert not wrapped.blocks[0].norm.training
    ours.float()
    assert {p.dtype for p in wrapped.parameters()} == {torch.float32}
    assert wrapped.shift.dtype == torch.float32
    ours(x.float()).sum().backward()


@all_world_sizes
def test_a_wrapper_works_inside_a_larger_module(world_size: int) -> None:
    run_ranks(world_size, _larger)


class Buffers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("own", torch.arange(6.0).view(2, 3).t() + dist.get_rank())
        self.register_buffer("row", torch.arange(4).expand(3, 4) + dist.get_rank())
        self.register_buffer("flag", torch.tensor(dist.get_rank() == 0))
        self.register_buffer("nothing", None)
        self.register_buffer("empty", torch.zeros(0, 3))
        self.inner = nn.Module()
        self.inner.register_buffer("tied", self.own)


def _buffers() -> None:
    model = Buffers()
    wrapped: Any = RotatedTensorParallel(model)
    assert torch.equal(wrapped.own.cpu(), torch.arange(6.0).view(2, 3).t())
    assert torch.equal(wrapped.row.cpu(), torch.arange(4).expand(3, 4))
    assert bool(wrapped.flag) is True
    assert wrapped.nothing is None
    assert wrapped.empty.shape == (0, 3)
    assert wrapped.inner.tied is wrapped.own
    assert {buffer.device for buffer in wrapped.buffers()} == {device()}


@all_world_sizes
def test_buffers_are_those_of_rank_0_and_stay_tied(world_size: int) -> None:
    run_ranks(world_size, _buffers)


def _exact() -> None:
    exact = {"rtol": 0.0, "atol": 0.0}
    x = torch.randn(4, 6)

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 20), nn.LayerNorm(20), nn.GELU(), nn.Linear(20, 3))

    for dtype in (torch.float32, torch.float64):
        for options in ({"policy": ROTATE}, {"inplace": True}, {}):
            check_parity(
                build,
                lambda step, rank: (x + step,),
                dtype=dtype,
                tolerance=exact,
                optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
                **options,
            )


def test_one_rank_is_bit_exact() -> None:
    run_ranks(1, _exact)


def _in_inference_mode() -> None:
    """What is made in that mode can be written nowhere else, and has no versions."""
    for policy in (ROTATE, None):
        dense = Model().to(device()).eval()
        x = torch.randn(4, 6, device=device())
        with torch.inference_mode():
            wrapped = RotatedTensorParallel(deepcopy(dense), policy=policy)
            first = wrapped(x)
        output = wrapped(x)
        torch.testing.assert_close(output, first.clone())
        output.sum().backward()
        torch.optim.SGD(wrapped.parameters(), lr=0.1).step()


@all_world_sizes
def test_a_model_may_be_wrapped_in_inference_mode(world_size: int) -> None:
    run_ranks(world_size, _in_inference_mode)


def _early_optimizer() -> None:
    model = Model().to(device())
    early = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapped = RotatedTensorParallel(model)
    wrapped(torch.randn(4, 6, device=device())).sum().backward()
    with pytest.raises(RuntimeError, match=r"built before the model was wrapped.*afterwards"):
        early.step()
    torch.optim.SGD(wrapped.parameters(), lr=0.1).step()


@all_world_sizes
def test_an_optimizer_built_too_early_is_a_clear_error(world_size: int) -> None:
    run_ranks(world_size, _early_optimizer)


# Errors: each before anything is changed.


def _unchanged(model: nn.Module, wrap: Callable[[], object], error: type, match: str) -> None:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    classes = [type(module) for module in model.modules()]
    keys = [set(vars(module)) for module in model.modules()]
    with pytest.raises(error, match=match):
        wrap()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        assert parameter is parameters[name]
    for name, buffer in model.named_buffers(remove_duplicate=False):
        assert buffer is buffers[name]
    assert classes == [type(module) for module in model.modules()]
    assert keys == [set(vars(module)) for module in model.modules()]


def _arguments() -> None:
    world_size = dist.get_world_size()

    def check(error: type, match: str, *args: Any, **kwargs: Any) -> None:
        model = Model().to(device())
        _unchanged(model, lambda: RotatedTensorParallel(model, *args, **kwargs), error, match)

    mesh = init_device_mesh(DEVICE_TYPE, (world_size,))
    cube = init_device_mesh(DEVICE_TYPE, (1, 1, world_size), mesh_dim_names=("pp", "dp", "rtp"))
    check(ValueError, "either group or mesh", dist.group.WORLD, mesh=mesh)
    check(ValueError, r"\('pp', 'dp', 'rtp'\): give the slice", mesh=cube)
    check(TypeError, r"group is a DeviceMesh.*mesh=", mesh)
    check(TypeError, "group is a str, not a ProcessGroup", "gloo")
    check(TypeError, "mesh is a ProcessGroup", mesh=dist.group.WORLD)
    check(ValueError, "is not in the group", dist.GroupMember.NON_GROUP_MEMBER)
    check(ValueError, "no_such_layer", policy={"no_such_layer": Rotate()})
    check(TypeError, "strategy", policy={"head": "rotate"})


@all_world_sizes
def test_wrong_arguments_are_errors_that_change_nothing(world_size: int) -> None:
    run_ranks(world_size, _arguments)


def _models_refused() -> None:
    with pytest.raises(TypeError, match=r"an nn\.Module, not function"):
        RotatedTensorParallel(lambda x: x)  # type: ignore[arg-type]

    def refused(model: nn.Module, match: str, error: type = ValueError) -> None:
        _unchanged(model, lambda: RotatedTensorParallel(model, policy=ROTATE), error, match)

    refused(RotatedTensorParallel(Model()), "the model is wrapped already")
    refused(nn.Sequential(DistributedDataParallel(Model().to(device()))), "0 is a DistributedData")
    refused(nn.Sequential(nn.Linear(2, 2), RotatedTensorParallel(Model())), "1 is wrapped already")
    refused(nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(2)), r"1\.weight has no shape yet")
    mesh = init_device_mesh(DEVICE_TYPE, (dist.get_world_size(),))
    sharded = nn.Sequential(nn.Linear(2, 2, device=device()))
    sharded[0].weight = nn.Parameter(distribute_tensor(sharded[0].weight, mesh, [Replicate()]))
    assert isinstance(sharded[0].weight, DTensor)
    refused(sharded, r"0\.weight is a DTensor")
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    second.weight = first.weight
    RotatedTensorParallel(first)
    refused(second, "weight is tied to a model that was wrapped before")
    graph = nn.Sequential(nn.Linear(2, 2, device=device()))
    graph[0].register_buffer("adjacency", torch.eye(2, device=device()).to_sparse())
    refused(graph, r"0\.adjacency is a buffer of layout torch\.sparse_coo")


@all_world_sizes
def test_models_that_cannot_be_wrapped_are_errors_that_change_nothing(world_size: int) -> None:
    run_ranks(world_size, _models_refused)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
def test_torchscript_is_refused_and_nothing_changed() -> None:
    run_ranks(1, _torchscript)


def _torchscript() -> None:
    model = nn.Sequential(nn.Linear(3, 3), torch.jit.script(nn.Linear(3, 3)))
    _unchanged(
        model,
        lambda: RotatedTensorParallel(model),
        TypeError,
        r"1\.weight belongs to a TorchScript",
    )


def test_no_process_group_is_an_error_that_says_how_to_make_one() -> None:
    if dist.is_initialized():
        pytest.skip("launched ranks have a process group here")
    model = Model()
    _unchanged(
        model,
        lambda: RotatedTensorParallel(model),
        RuntimeError,
        r"torchrun.*init_process_group\(\) before wrapping",
    )


def _differing(change: str) -> None:
    last = dist.get_rank() == dist.get_world_size() - 1
    policy = ROTATE
    model = Model().to(device())
    if change == "shape" and last:
        model.head = nn.Linear(6, 4, device=device())
        model.gain = nn.Parameter(torch.ones(4, device=device()))
    if change == "frozen" and last:
        model.blocks[0].linear.weight.requires_grad_(False)
    if change == "policy" and last:
        policy = ShardingPolicy()
    if change == "tied use":  # at home it is the same on all ranks
        model.blocks[0].again = nn.Linear(6, 6, bias=False, device=device())
        model.blocks[0].again.weight = model.blocks[0].linear.weight
        rules: dict[str, Any] = {"*.again": Gather() if last else Rotate(), "*linear*": Rotate()}
        policy = ShardingPolicy(rules=rules, replicate_below=0)
    if change == "buffer" and last:
        model.register_buffer("shift", torch.zeros(5, device=device()))
    where = {
        "tied use": r"again\.weight Gather",
        "shape": r"gain \(4,\)",
        "buffer": r"shift \(5,\)",
        "policy": "Replicate",
    }
    match = where.get(change, "blocks.0.linear.weight.*requires_grad=False")
    _unchanged(model, lambda: RotatedTensorParallel(model, policy=policy), OutOfStepError, match)
    RotatedTensorParallel(Model(), policy=ROTATE)  # the group is as good as before


@multi_world_sizes
@pytest.mark.parametrize("change", ["shape", "frozen", "policy", "buffer", "tied use"])
def test_different_models_on_ranks_are_an_error_that_names_the_first_difference(
    world_size: int, change: str
) -> None:
    run_ranks(world_size, _differing, change)


def _peak() -> None:
    width, depth = 2048, 24
    torch.cuda.empty_cache()
    model = nn.Sequential(*[nn.Linear(width, width) for _ in range(depth)])
    whole = sum(p.nbytes for p in model.parameters())
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    wrapped: Any = RotatedTensorParallel(model, inplace=True)
    peak = torch.cuda.max_memory_allocated() - before
    # Beside its shards: the pieces in flight (16 MiB, two at a time) and the staging (16 MiB).
    assert peak < whole / dist.get_world_size() + (64 << 20), f"{peak} of {whole} bytes"
    assert all(p.device.type == "cuda" for p in wrapped.parameters())


@pytest.mark.skipif(DEVICE_TYPE != "cuda", reason="needs GPUs")
@multi_world_sizes
def test_a_cpu_model_reaches_the_gpu_shard_by_shard(world_size: int) -> None:
    run_ranks(world_size, _peak)
