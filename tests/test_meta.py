"""Models on the meta device: initialised one module at a time, with values that are rank 0's.

Also runs as ranks of a job: `torchrun --nproc_per_node=2 -m pytest tests/test_meta.py`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from copy import deepcopy
from typing import Any
from unittest import mock

import pytest

if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))

import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import parametrizations

import rtp_wrap.home
from rtp_wrap import (
    Gather,
    Ignore,
    MixedPrecisionPolicy,
    OutOfStepError,
    Replicate,
    Rotate,
    RotatedTensorParallel,
    ShardingPolicy,
)
from rtp_wrap.modules.linear import RotatedLinear
from tests.data import own_batch, whole_batch
from tests.parity import FP64, compare_gradients, compare_weights, full, mean_square, sgd
from tests.ranks import (
    DEVICE_TYPE,
    WORLD_SIZES,
    all_world_sizes,
    device,
    multi_world_sizes,
    run_ranks,
)
from tests.test_memory import Peak

ROTATE = ShardingPolicy(replicate_below=0)
META = torch.device("meta")
InitFn = Callable[[nn.Module], None]


class Angles(nn.Module):
    """Has buffers only, one of them not persistent, and no public way to set them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("angles", torch.empty(3), persistent=False)
        self.register_buffer("count", torch.empty((), dtype=torch.int64))


class Net(nn.Module):
    """Uneven sizes, an own parameter, a tie, a frozen layer, a layer in two places, buffers."""

    def __init__(self, width: int = 7) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.empty(width))
        self.gain.is_special = True  # type: ignore[attr-defined]
        self.same_gain = self.gain
        self.first = nn.Linear(6, width)
        self.inner = nn.Sequential(nn.Linear(width, width), nn.Tanh())
        self.tied = nn.Linear(width, width, bias=False)
        self.tied.weight = self.inner[0].weight
        self.frozen = nn.Linear(width, 5).requires_grad_(False)
        self.norm = nn.BatchNorm1d(width).eval()
        self.again = self.inner
        self.angles = Angles()
        self.register_buffer("same", self.angles.angles)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.inner(self.first(x)))
        return self.frozen(self.tied(self.again(x * self.gain))) + self.same.sum()


def _value(fqn: str, like: torch.Tensor) -> torch.Tensor:
    """What the test initialises a parameter or buffer with; differs from any other's."""
    generator = torch.Generator().manual_seed(zlib.crc32(fqn.encode()))
    value = torch.rand(like.shape, generator=generator, dtype=torch.float64, device="cpu") + 0.5
    return (value * 100 if not like.is_floating_point() else value).to(device(), like.dtype)


def _own(module: nn.Module) -> dict[str, torch.Tensor]:
    return {
        **dict(module.named_parameters(recurse=False)),
        **dict(module.named_buffers(recurse=False)),
    }


def _in_place(model: nn.Module, off: float = 0.0) -> InitFn:
    """Values by fqn, changed by ``off`` on every rank but the first."""
    fqns = {module: fqn for fqn, module in model.named_modules()}
    rank = dist.get_rank()

    def initialise(module: nn.Module) -> None:
        for name, tensor in _own(module).items():
            tensor.copy_(_value(f"{fqns[module]}.{name}", tensor))
            tensor.add_(int(off * rank))

    return initialise


def _after_to_empty(model: nn.Module, off: float = 0.0) -> InitFn:
    in_place = _in_place(model, off)

    def initialise(module: nn.Module) -> None:
        in_place(module.to_empty(device=device(), recurse=False))

    return initialise


def _after_to_empty_of_all_below(model: nn.Module, off: float = 0.0) -> InitFn:
    in_place = _in_place(model, off)
    return lambda module: in_place(module.to_empty(device=device()))


def _in_others(model: nn.Module, off: float = 0.0) -> InitFn:
    """Puts new tensors in the place of those that are there."""
    in_place = _in_place(model, off)

    def initialise(module: nn.Module) -> None:
        for name, tensor in _own(module).items():
            other = torch.empty_like(tensor)
            setattr(module, name, nn.Parameter(other) if name in module._parameters else other)
        in_place(module)

    return initialise


INITIALISERS = (_in_place, _after_to_empty, _after_to_empty_of_all_below, _in_others)


def _built(
    build: Callable[[], nn.Module],
    dtype: torch.dtype = torch.float64,
    where: torch.device = META,
) -> Any:
    # Converting afterwards would untie buffers.
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with where:
            return build()
    finally:
        torch.set_default_dtype(default)


def _initialised(build: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> nn.Module:
    """The same on the device, as one process would make it: what the wrapped model must equal."""
    dense = _built(build, dtype, device())
    assert isinstance(dense, nn.Module)
    initialise = _in_place(dense)
    seen: set[torch.Tensor] = set()
    with torch.no_grad():
        for module in dense.modules():
            own = _own(module).values()
            kept = {tensor: tensor.clone() for tensor in own if tensor in seen}
            initialise(module)
            for tensor, value in kept.items():
                tensor.copy_(value)
            seen.update(own)
    return dense


def _check_equal(wrapped: nn.Module, dense: nn.Module) -> None:
    """Bit for bit: values are copied and never computed with."""
    theirs = dict(dense.named_parameters())
    assert [name for name, _ in wrapped.named_parameters()] == list(theirs)
    for name, parameter in wrapped.named_parameters():
        assert isinstance(parameter, DTensor), name
        assert parameter.device.type == DEVICE_TYPE
        assert parameter.dtype == theirs[name].dtype
        assert parameter.requires_grad == theirs[name].requires_grad, name
        assert torch.equal(full(parameter.detach()), theirs[name].detach()), name
    buffers = dict(dense.named_buffers())
    assert [name for name, _ in wrapped.named_buffers()] == list(buffers)
    for name, buffer in wrapped.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
        assert buffer.dtype == buffers[name].dtype
    assert list(wrapped.state_dict()) == list(dense.state_dict())


def _train(wrapped: nn.Module, dense: nn.Module, steps: int = 3) -> None:
    """Both alike from here, in fp64: the dense model on the whole batch."""
    optimizers = [sgd(model.parameters()) for model in (dense, wrapped)]
    for step in range(steps):
        expected = dense(whole_batch(step))
        output = wrapped(own_batch(step))
        own = expected.chunk(dist.get_world_size())[dist.get_rank()]
        torch.testing.assert_close(output, own, **FP64)
        for loss, optimizer in zip((expected, output), optimizers, strict=True):
            optimizer.zero_grad()
            mean_square(loss).backward()
        compare_gradients(dense, wrapped)
        for optimizer in optimizers:
            optimizer.step()
        compare_weights(dense, wrapped)


def _exact_and_training() -> None:
    for initialiser in INITIALISERS:
        model = _built(Net)
        dense = _initialised(Net)
        inner = model.inner
        init = _Counted(initialiser(model, off=1.0))
        wrapped = RotatedTensorParallel(model, policy=ROTATE, param_init_fn=init)
        _check_equal(wrapped, dense)
        # Parents first. Not what has no tensors, or only another's, nor a second time.
        assert init.fqns(model) == ["", "first", "inner.0", "frozen", "norm", "angles"]
        assert all(isinstance(each, RotatedLinear) for each in (model.first, model.inner[0]))
        assert model.tied.weight is model.inner[0].weight
        assert model.again is model.inner is inner
        assert model.same is model.angles.angles
        assert model.gain is model.same_gain
        assert model.gain.is_special
        assert not model.frozen.weight.requires_grad
        _train(wrapped, dense, steps=3 if initialiser is _in_place else 1)


class _Counted:
    """An init function and the modules that it was called with."""

    def __init__(self, initialise: InitFn) -> None:
        self._initialise = initialise
        self._modules: list[nn.Module] = []

    def __call__(self, module: nn.Module) -> None:
        self._modules.append(module)
        self._initialise(module)

    def fqns(self, model: nn.Module) -> list[str]:
        names = {module: fqn for fqn, module in model.named_modules()}
        return [names[module] for module in self._modules]


@all_world_sizes
def test_values_are_those_of_rank_0s_init_function_and_train(world_size: int) -> None:
    run_ranks(world_size, _exact_and_training)


class Own(nn.Module):
    """Sets its own tensors, in ways that depend on where new tensors are made."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(6))
        self.register_buffer("steps", torch.empty(6), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.scale, 1.0, 0.1)
        self.steps = 1.0 / (1 + torch.arange(6.0)).to(self.steps.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale + self.steps


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 5, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lstm(x[:, None])[0][:, 0]


def _stack() -> nn.Module:
    return nn.Sequential(
        Own(), nn.Linear(6, 9), nn.LayerNorm(9), nn.Tanh(), nn.Linear(9, 6), Recurrent()
    )  # fmt: skip


def _seeded(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return _built(build, where=device())


def _reset() -> None:
    dense = _seeded(_stack)
    after = torch.rand(3, device=device())
    model = _built(_stack)
    torch.manual_seed(0)
    wrapped = RotatedTensorParallel(model, policy=ROTATE)
    # Initialised in the order in which it was built, from the same random state.
    _check_equal(wrapped, dense)
    assert torch.equal(torch.rand(3, device=device()), after)
    assert not hasattr(model[5].lstm, "_whole_weights")
    _train(wrapped, dense)


@all_world_sizes
def test_by_default_modules_reset_themselves_as_when_they_are_built(world_size: int) -> None:
    run_ranks(world_size, _reset)


def _defaults() -> None:
    def check(wrap: Callable[[], tuple[nn.Module, nn.Module]]) -> None:
        try:
            wrapped, dense = wrap()
        finally:
            torch.set_default_device(None)
            torch.set_default_dtype(torch.float32)
        _check_equal(wrapped, dense)
        _train(wrapped, dense, steps=1)

    def block() -> tuple[nn.Module, nn.Module]:
        dense = _seeded(_stack)
        torch.manual_seed(0)
        with META:
            return RotatedTensorParallel(_built(_stack), policy=ROTATE), dense

    def default_device() -> tuple[nn.Module, nn.Module]:
        dense = _seeded(_stack)
        torch.manual_seed(0)
        torch.set_default_device("meta")
        wrapped = RotatedTensorParallel(_built(_stack), policy=ROTATE)
        assert torch.get_default_device() == META
        return wrapped, dense

    def default_dtype() -> tuple[nn.Module, nn.Module]:
        model = _built(Net)
        dense = _initialised(Net)
        torch.set_default_dtype(torch.bfloat16)
        init = _in_place(model)
        return RotatedTensorParallel(model, policy=ROTATE, param_init_fn=init), dense

    def real_model() -> tuple[nn.Module, nn.Module]:
        dense = _seeded(_stack)
        mine = deepcopy(dense)
        with META:
            return RotatedTensorParallel(mine, policy=ROTATE, param_init_fn=pytest.fail), dense

    for wrap in (block, default_device, default_dtype, real_model):
        check(wrap)


@all_world_sizes
def test_default_devices_and_dtypes_do_not_matter(world_size: int) -> None:
    run_ranks(world_size, _defaults)


# What keeps its values.


class Mixed(nn.Module):
    """Real and meta tensors in one module, below it, and tied to an earlier module."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 6)
        self.loaded = nn.Parameter(torch.rand(6, dtype=torch.float64))
        self.register_buffer("shift", torch.rand(6, dtype=torch.float64))
        self.late = Late(self.head.weight, self.shift)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.late(self.head(x) * self.loaded + self.shift)


class Late(nn.Module):
    def __init__(self, weight: nn.Parameter, shift: torch.Tensor) -> None:
        super().__init__()
        self.head = nn.Linear(6, 6)
        self.head.weight = weight
        self.weight, self.other = weight, weight
        self.fresh = nn.Parameter(torch.empty(6))
        self.register_buffer("shift", shift)
        self.below = nn.Linear(6, 5)

    def reset_parameters(self) -> None:
        """Sets more than its own, as some do."""
        nn.init.constant_(self.weight, 17.0)
        assert (self.other == 17.0).all()
        nn.init.constant_(self.fresh, 2.0)
        self.shift.zero_()
        for parameter in self.below.parameters():
            nn.init.constant_(parameter, 5.0)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.below(self.head(x) @ self.weight.t() * self.fresh + self.shift)


def _kept() -> None:
    torch.manual_seed(0)
    with device():
        dense = Mixed().double()
        model = deepcopy(dense)
    # On the meta device: head, and what is tied to it; late.fresh; nothing of late.below.
    model.head.to("meta")
    with torch.no_grad():
        weight = nn.Parameter(torch.empty_like(dense.head.weight, device=META))
        model.head.weight = model.late.head.weight = weight
        model.late.weight = model.late.other = weight
        model.late.fresh = nn.Parameter(torch.empty_like(dense.late.fresh, device=META))
        torch.manual_seed(1)
        dense.head.reset_parameters()
        dense.late.fresh.fill_(2.0)
    torch.manual_seed(1)
    wrapped = RotatedTensorParallel(model, policy=ROTATE)
    _check_equal(wrapped, dense)
    assert model.late.weight is model.late.other is model.head.weight is model.late.head.weight
    _train(wrapped, dense)


@all_world_sizes
def test_what_has_values_already_keeps_them(world_size: int) -> None:
    run_ranks(world_size, _kept)


def _stood_in() -> None:
    model = nn.Linear(3, 3, dtype=torch.float64, device=device())
    weight = model.weight.detach().clone()
    bias = torch.empty(3, dtype=torch.float64, device=META)
    model.bias = nn.Parameter(bias, requires_grad=False)
    model.bias.is_special = True  # type: ignore[attr-defined]

    def initialise(module: nn.Module) -> None:
        assert isinstance(module, nn.Linear)
        assert module.weight.requires_grad
        assert not module.bias.requires_grad
        assert module.bias.is_special
        module.bias.copy_(module.weight.sum(1))
        module.weight = None  # type: ignore[assignment]

    wrapped = RotatedTensorParallel(model, policy=ROTATE, param_init_fn=initialise)
    assert torch.equal(full(wrapped.weight.detach()), weight)
    assert torch.equal(full(wrapped.bias.detach()), weight.sum(1))


@all_world_sizes
def test_an_initialisation_may_read_what_its_module_has_already(world_size: int) -> None:
    run_ranks(world_size, _stood_in)


# One module at a time.

WIDTH = 64


def _check_peak() -> None:
    square = WIDTH * WIDTH * 4
    for build, whole, initialise in (
        (lambda: nn.Linear(WIDTH, WIDTH, bias=False), square, None),
        (lambda: nn.Linear(WIDTH, WIDTH, bias=False), square, _random),
        (lambda: nn.LSTM(WIDTH, WIDTH), 8 * square, None),
        # An LSTM has a list of its weights, which gets others put in their place, too.
        (lambda: nn.LSTM(WIDTH, WIDTH), 8 * square, _random_others),
    ):
        model = _built(lambda: nn.Sequential(*[build() for _ in range(4)]), torch.float32)  # noqa: B023
        # What is put in the place of another tensor exists beside it for a while.
        once = whole * (1 + (initialise is _random_others))
        homes = 4 * whole // dist.get_world_size()
        # Besides: staging, pieces and biases; far less than another module's whole weights.
        allowed = homes + once + whole // 2
        with (
            mock.patch.object(rtp_wrap.home, "PIECE_BYTES", whole // 16),
            Peak(0, allowed, []) as peak,
        ):
            RotatedTensorParallel(model, policy=SMALL, param_init_fn=initialise)
        assert whole <= sum(peak.sizes) <= allowed, peak.sizes


#: With staging of next to nothing.
SMALL = ShardingPolicy(replicate_below=0, staging_bytes=1024)


def _random(module: nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        parameter.normal_()


def _random_others(module: nn.Module) -> None:
    for name, parameter in list(module.named_parameters(recurse=False)):
        setattr(module, name, nn.Parameter(torch.empty_like(parameter)))
    _random(module)


@pytest.mark.parametrize("world_size", [size for size in WORLD_SIZES if size > 1][:1])
def test_no_two_modules_have_whole_weights_at_a_time(world_size: int) -> None:
    run_ranks(world_size, _check_peak)


def _check_gone() -> None:
    earlier: list[StorageWeakRef] = []

    def initialise(module: nn.Module) -> None:
        assert all(storage.expired() for storage in earlier)
        in_place(module)
        earlier.extend(StorageWeakRef(each.untyped_storage()) for each in _own(module).values())

    model = _built(Net)
    in_place = _in_place(model)
    RotatedTensorParallel(model, policy=ROTATE, param_init_fn=initialise)
    assert len(earlier) > 10
    assert all(storage.expired() for storage in earlier)


@all_world_sizes
def test_whole_tensors_are_gone_before_the_next_module(world_size: int) -> None:
    run_ranks(world_size, _check_gone)


def _check_allocator() -> None:
    width, depth = 1024, 8
    weight = width * width * 4
    build = lambda: nn.Sequential(*[nn.Linear(width, width) for _ in range(depth)])  # noqa: E731
    model = _built(build, torch.float32)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    policy = ShardingPolicy(replicate_below=0, staging_bytes=1 << 18)
    with mock.patch.object(rtp_wrap.home, "PIECE_BYTES", 1 << 16):
        wrapped = RotatedTensorParallel(model, policy=policy)
    peak = torch.cuda.max_memory_allocated() - before
    # One whole weight, and a little for biases, pieces and the collective's own.
    homes = depth * weight // dist.get_world_size()
    assert peak < homes + weight * 3 // 2, peak / weight
    mean_square(wrapped(torch.randn(2, width, device=device()))).backward()


@pytest.mark.skipif(DEVICE_TYPE != "cuda", reason="CUDA counts what is allocated")
@all_world_sizes
def test_the_allocator_agrees(world_size: int) -> None:
    run_ranks(world_size, _check_allocator)


# Options of the wrapper.


def _options(
    sizes: tuple[int, ...],
    rule: Any,
    dtype: torch.dtype,
    inplace: bool,
    initialiser: Callable[[nn.Module, float], InitFn],
    low_precision: bool,
) -> None:
    def build() -> nn.Module:
        layers = [nn.Linear(a, b) for a, b in zip((6, *sizes), (*sizes, 5), strict=True)]
        return nn.Sequential(*layers, nn.MultiheadAttention(4, 2, add_bias_kv=True))

    model = _built(build, dtype)
    dense = _initialised(build, dtype)
    wrapped = RotatedTensorParallel(
        model,
        inplace=inplace,
        policy=ShardingPolicy(rules={nn.Linear: rule}, replicate_below=0, staging_bytes=1024),
        mixed_precision=MixedPrecisionPolicy(param_dtype=torch.bfloat16) if low_precision else None,
        param_init_fn=initialiser(model, 1.0),
    )
    _check_equal(wrapped, dense)
    assert isinstance(model[0], RotatedLinear) == (isinstance(rule, Rotate))
    del model[-1], dense[-1]
    if dtype == torch.float64 and not low_precision:
        _train(wrapped, dense, steps=2)
    else:
        mean_square(wrapped(own_batch(0).to(dtype)).float()).backward()


@settings(max_examples=15)
@given(
    world_size=st.sampled_from(WORLD_SIZES),
    sizes=st.lists(st.integers(1, 12), max_size=2).map(tuple),
    rule=st.sampled_from([Rotate(), Rotate(1), Gather(), Gather(1), Replicate()]),
    dtype=st.sampled_from([torch.float64, torch.float64, torch.float32, torch.bfloat16]),
    inplace=st.booleans(),
    initialiser=st.sampled_from(INITIALISERS),
    low_precision=st.booleans(),
)
def test_values_are_exact_whatever_the_options(world_size: int, **options: Any) -> None:
    rule = options["rule"]
    if isinstance(rule, Gather):  # biases have one dim only
        options["rule"] = Gather(0)
    run_ranks(world_size, _options, **options)


def _subgroup() -> None:
    group = dist.new_group(list(range(1, dist.get_world_size())))
    if dist.get_rank() == 0:
        return
    assert isinstance(group, dist.ProcessGroup)
    model = _built(Net)
    dense = _initialised(Net)

    def off_by_place(module: nn.Module) -> None:
        in_place(module)
        for tensor in _own(module).values():
            tensor.add_(group.rank())

    in_place = _in_place(model)
    _check_equal(RotatedTensorParallel(model, group, param_init_fn=off_by_place), dense)
    dist.destroy_process_group(group)


def _meshes() -> None:
    _subgroup()
    mesh = init_device_mesh(DEVICE_TYPE, (dist.get_world_size(),))
    model = _built(Net)
    dense = _initialised(Net)
    wrapped = RotatedTensorParallel(model, mesh=mesh, param_init_fn=_in_place(model, 1.0))
    _check_equal(wrapped, dense)


@multi_world_sizes
def test_subgroups_and_meshes_initialise_their_own_models(world_size: int) -> None:
    run_ranks(world_size, _meshes)


# Errors.


def _refused(
    model: nn.Module, match: str, error: type[Exception] = ValueError, **wrap: Any
) -> None:
    """Refused on every rank, with everything as it was."""
    before = [(dict(m._parameters), dict(m._buffers), type(m)) for m in model.modules()]
    with pytest.raises(error, match=match):
        RotatedTensorParallel(model, **wrap)
    for module, (parameters, buffers, kind) in zip(model.modules(), before, strict=True):
        assert type(module) is kind
        for now, then in ((module._parameters, parameters), (module._buffers, buffers)):
            assert list(now) == list(then)
            assert all(now[name] is then[name] for name in then)


def _without_reset() -> None:
    attention = nn.MultiheadAttention(4, 2, device=META)
    _refused(
        nn.Sequential(nn.Linear(2, 2, device=META), attention),
        r"of 1 \(MultiheadAttention\), which .* param_init_fn=.* or give them values before",
    )
    _refused(nn.Sequential(_built(Angles), nn.Linear(2, 2)), r"buffers of 0 \(Angles\), which")
    _refused(nn.ParameterList([torch.empty(2, device=META)]), r"of the root ParameterList ")
    normed = parametrizations.weight_norm(nn.Linear(2, 3, device=META))
    _refused(normed, r"of parametrizations.weight \(ParametrizationList\), which")
    many = nn.ModuleList(nn.ParameterList([torch.empty(2, device=META)]) for _ in range(8))
    _refused(many, r"of 0 \(ParameterList\), 1 \(.*, 4 \(ParameterList\) and 3 more, which")
    # All of its tensors are another module's.
    tied = nn.Sequential(nn.Linear(2, 2, device=META), nn.ParameterList())
    tied[1].append(tied[0].weight)
    wrapped = RotatedTensorParallel(tied)
    assert wrapped[1][0] is wrapped[0].weight


def _bad_arguments() -> None:
    linear = nn.Linear(2, 2, device=META)
    _refused(linear, r"param_init_fn=3 cannot be called", TypeError, param_init_fn=3)
    two = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device=META))
    for fn in (None, _random):
        _refused(
            two, r"^1\.weight is on the meta .* ignores it", policy={"1": Ignore()},
            param_init_fn=fn,
        )  # fmt: skip
    lazy = nn.LazyLinear(2, device=META)
    _refused(lazy, "^weight has no shape yet", param_init_fn=_random)
    _refused(two, "'nothing' chose no parameter", policy={"nothing": Rotate()})


def _bad_initialisations() -> None:
    def check(match: str, fn: Callable[[Any], object] | None, error: type = ValueError) -> None:
        model = nn.Sequential(nn.Linear(2, 3, device=META), nn.BatchNorm1d(3, device=META))
        if fn is None:
            model[1].reset_parameters = lambda: model[1].weight.data.fill_(1.0)
        # The first module is what fails, so that nothing is changed after all.
        _refused(model if fn else model[1], match, error, param_init_fn=fn)

    def put(name: str, value: torch.Tensor | None) -> Callable[[nn.Module], None]:
        return lambda module: setattr(module, name, value)

    check(r"^0\.bias is gone after its module was initialised", put("bias", None))
    still = nn.Parameter(torch.empty(3, device=META))
    check(r"^0\.bias is still on the meta device after", put("bias", still))
    check(
        r"^0\.weight is torch.float32 of shape \(3, 2, 1\) instead of torch.float32 of shape "
        r"\(3, 2\) .* put one of its shape and dtype in its place",
        put("weight", nn.Parameter(torch.zeros(3, 2, 1))),
    )
    check(
        r"^0\.weight is torch.float64 of .* instead of torch.float32",
        put("weight", nn.Parameter(torch.zeros(3, 2, dtype=torch.float64))),
    )
    check(r"^0: .* registered extra, which", lambda m: m.register_buffer("extra", torch.ones(1)))
    check(r"^0: .* raised ZeroDivisionError: .*values of other", lambda m: 1 // 0, RuntimeError)
    check(r"^bias was left without values by reset_parameters", None)
    for name in ("bias", "running_mean", "num_batches_tracked"):
        norm = nn.BatchNorm1d(3, device=META)

        def reset(norm: nn.Module = norm, name: str = name) -> None:
            for each, tensor in _own(norm).items():
                if each != name:
                    tensor.data.zero_()

        norm.reset_parameters = reset  # type: ignore[assignment]
        _refused(norm, rf"^{name} was left without values by reset_parameters")


def _refusals() -> None:
    _without_reset()
    _bad_arguments()
    _bad_initialisations()


@all_world_sizes
def test_what_cannot_be_initialised_is_refused_by_name(world_size: int) -> None:
    run_ranks(world_size, _refusals, timeout=60)


def _not_alike() -> None:
    rank = dist.get_rank()
    where = device() if rank == 0 else META
    for build in (lambda: nn.Linear(2, 2, device=where), lambda: _loaded_on_rank_0(Angles)):
        _refused(
            build(), r"rank 0: .* meta=False.*, rank 1: .* meta=True.*Wrap the same model",
            OutOfStepError,
        )  # fmt: skip
    _refused(
        nn.MultiheadAttention(4, 2, device=META), "rank 0: a param_init_fn, rank 1: no param_init_",
        OutOfStepError, param_init_fn=_random if rank == 0 else None,
    )  # fmt: skip


def _loaded_on_rank_0(build: Callable[[], nn.Module]) -> nn.Module:
    return build().to(device()) if dist.get_rank() == 0 else _built(build, torch.float32)


@multi_world_sizes
def test_ranks_that_differ_in_what_is_on_meta_are_told(world_size: int) -> None:
    run_ranks(world_size, _not_alike, timeout=60)
