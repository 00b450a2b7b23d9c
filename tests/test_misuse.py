"""What must not be done to a wrapped model: an error at once, on every rank, with the remedy."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest

if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import parametrize

from rtp_wrap import Gather, Ignore, RotatedTensorParallel, ShardingPolicy
from tests.parity import FP64, compare_gradients, compare_weights, mean_square
from tests.ranks import DEVICE_TYPE, all_world_sizes, device, multi_world_sizes, run_ranks

#: Seconds. A mistake is an error at once, never a wait for ranks that do not come.
LIMIT = 60.0
POLICY = ShardingPolicy(rules={"gathered": Gather(), "ignored": Ignore()}, replicate_below=8)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rotated = nn.Linear(6, 8)  # its bias is gathered
        self.norm = nn.LayerNorm(4)  # replicated
        self.gathered = nn.Linear(8, 4)
        self.ignored = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.ignored(self.norm(self.gathered(self.rotated(x))))


def _dense() -> Net:
    torch.manual_seed(0)
    return Net().to(device(), torch.float64)


def _wrap() -> Any:
    return RotatedTensorParallel(_dense(), policy=POLICY)


def _x() -> torch.Tensor:
    return torch.randn(4, 6, dtype=torch.float64, device=device())


def _plain(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, dtype=torch.float64, device=device()))


def _check_replaced() -> None:
    for fqn, shape in {
        "rotated.weight": (8, 6),
        "rotated.bias": (8,),
        "gathered.weight": (4, 8),
        "norm.bias": (4,),
    }.items():
        model = _wrap()
        layer, name = model.get_submodule(fqn.split(".")[0]), fqn.split(".")[1]
        before = model(_x()).shape
        # At once, where torch lets us see it, and nothing is changed.
        with pytest.raises(RuntimeError, match=rf"^{fqn}: a plain parameter cannot be set after"):
            setattr(layer, name, _plain(*shape))
        with pytest.raises(RuntimeError, match=rf"^{fqn}: a plain parameter cannot be set after"):
            layer.register_parameter(name, _plain(*shape))
        assert model(_x()).shape == before
        # Behind the module's back: at the next forward.
        kept = layer._parameters[name]
        layer._parameters[name] = _plain(*shape)
        with pytest.raises(RuntimeError, match=rf"^{fqn}: it was replaced by a plain Parameter"):
            model(_x())
        layer._parameters[name] = kept
        with pytest.raises(RuntimeError, match=rf"^{fqn}: it was replaced by a plain Tensor"):
            torch.func.functional_call(model.module, {fqn: _plain(*shape).detach()}, _x())
        assert model(_x()).shape == before


@all_world_sizes
def test_a_parameter_that_was_replaced_is_named(world_size: int) -> None:
    run_ranks(world_size, _check_replaced, timeout=LIMIT)


def _check_transforms() -> None:
    model = _wrap()
    expected = model(_x()).shape
    refused = r"^rotated.weight: a transform of torch.func \(vmap, grad, jvp"
    with pytest.raises(RuntimeError, match=refused):
        torch.func.vmap(model)(_x()[None])
    with pytest.raises(RuntimeError, match=refused):
        torch.func.grad(lambda x: model.rotated(x).sum())(_x())
    inside = model.register_forward_pre_hook(lambda _, x: torch.func.vmap(model.rotated)(*x))
    with pytest.raises(RuntimeError, match=refused):
        model(_x()[None])
    inside.remove()
    assert model(_x()).shape == expected


@multi_world_sizes
def test_transforms_of_torch_func_are_refused(world_size: int) -> None:
    run_ranks(world_size, _check_transforms, timeout=LIMIT)


def _check_uncounted() -> None:
    model, x = _wrap(), _x()
    before, state = model(x), model.state_dict()
    with torch.inference_mode():
        model.load_state_dict({fqn: each.clone() for fqn, each in state.items()}, assign=True)
        with pytest.raises(RuntimeError, match=r"^rotated.weight was made in inference mode"):
            model(x)
    model.load_state_dict(state, assign=True)
    assert torch.equal(model(x), before)


@multi_world_sizes
def test_weights_of_inference_mode_are_named(world_size: int) -> None:
    run_ranks(world_size, _check_uncounted, timeout=LIMIT)


def _check_written() -> None:
    """What the error advises, each of it."""
    for fqn in ("rotated.weight", "rotated.bias", "gathered.weight", "norm.bias"):
        model, dense = _wrap(), _dense()
        parameter = model.get_parameter(fqn)
        for factor in (2, 3, 4):
            value = dense.get_parameter(fqn).detach() * factor
            if factor == 2:
                model.load_state_dict({fqn: value}, strict=False)
            elif factor == 3:
                with torch.no_grad():
                    parameter.copy_(
                        distribute_tensor(value, parameter.device_mesh, parameter.placements)
                    )
            else:
                with torch.no_grad():
                    parameter.to_local().mul_(4 / 3)
            assert model.get_parameter(fqn) is parameter
            torch.testing.assert_close(parameter.full_tensor(), value)
        with torch.no_grad():
            dense.get_parameter(fqn).mul_(4)
        x = _x()
        torch.testing.assert_close(model(x), dense(x))


@all_world_sizes
def test_values_are_written_into_parameters_as_the_errors_advise(world_size: int) -> None:
    run_ranks(world_size, _check_written, timeout=LIMIT)


def _check_additions() -> None:
    model = _wrap()
    with pytest.raises(RuntimeError, match=r"^rotated\.scale: a plain parameter cannot be set"):
        model.rotated.scale = _plain(2)
    for add in (
        lambda: setattr(model, "adapter", nn.Linear(2, 2)),
        lambda: setattr(model.rotated, "adapter", nn.Linear(2, 2)),
        lambda: setattr(model, "rotated", nn.Linear(6, 8)),
    ):
        with pytest.raises(RuntimeError, match=r"a Linear with the plain parameter weight cannot"):
            add()
    holder = RotatedTensorParallel(nn.Sequential(nn.Linear(2, 2), nn.ModuleList([nn.Linear(2, 2)])))
    for add in (
        lambda: holder[1].append(nn.Linear(2, 2)),
        lambda: holder.module.append(nn.Linear(2, 2)),
        lambda: holder.add_module("more", nn.Linear(2, 2)),
        lambda: holder.register_module("more", nn.Linear(2, 2)),
    ):
        with pytest.raises(RuntimeError, match=r"a Linear with the plain parameter weight cannot"):
            add()
    with pytest.raises(RuntimeError, match=r"^scale: a plain parameter cannot be set after"):
        holder.register_parameter("scale", _plain(2))
    # What has nothing to average may come and go.
    holder.add_module("more", nn.ReLU())
    model.frozen = nn.Linear(2, 2).requires_grad_(False)
    model.activation = nn.ReLU()
    model.ignored.weight = _plain(3, 4)
    model.spare = model.rotated
    mean_square(model(_x())).backward()


@all_world_sizes
def test_what_is_added_after_wrapping_is_refused(world_size: int) -> None:
    run_ranks(world_size, _check_additions, timeout=LIMIT)


class Half(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight / 2


def _check_parametrized() -> None:
    model = _wrap()
    parametrize.register_parametrization(model.rotated, "weight", Half())
    with pytest.raises(RuntimeError, match=r"^rotated\.weight: it was taken away after wrapping"):
        model(_x())


@multi_world_sizes
def test_parametrizing_a_rotated_weight_is_an_error(world_size: int) -> None:
    run_ranks(world_size, _check_parametrized, timeout=LIMIT)


def _check_moves() -> None:
    model = _wrap()
    elsewhere: list[Callable[[], object]] = [lambda: model.to("meta")]
    if DEVICE_TYPE == "cuda":
        elsewhere += [lambda: model.cpu(), lambda: model.rotated.to("cpu")]
        other = (torch.cuda.current_device() + 1) % torch.cuda.device_count()
        if other != torch.cuda.current_device():
            elsewhere.append(lambda: model.cuda(other))
    for move in elsewhere:
        with pytest.raises(
            RuntimeError, match=r"cannot move to .* its shards live there\. Wrap it"
        ):
            move()
    if DEVICE_TYPE == "cpu":
        with pytest.raises(RuntimeError, match="its parameters have no shared memory"):
            model.share_memory()
    # Where it is already, and another dtype, are fine.
    assert model.to(device()) is model
    model.float()
    assert model(_x().float()).dtype == torch.float32
    model.half()
    if dist.get_world_size() > 1:
        with pytest.raises(TypeError, match=r"^rotated: input is torch.float32 but the layer comp"):
            model(_x().float())
    model.double()
    mean_square(model(_x())).backward()


@all_world_sizes
def test_a_model_stays_where_its_group_is(world_size: int) -> None:
    run_ranks(world_size, _check_moves, timeout=LIMIT)


def _check_room(transport: str) -> None:
    """The staging has room for a kernel in fp32, but not in fp64."""
    model: Any = RotatedTensorParallel(
        nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.Conv2d(1, 2, 9, bias=False)).to(device()),
        policy=ShardingPolicy(replicate_below=0, transport=transport),
    )
    wide = {"1.weight": torch.zeros(2, 1, 9, 9, dtype=torch.float64)}
    before = dict(model.named_parameters())
    for convert in (
        model.double,
        model.module.double,
        model[1].double,
        lambda: model.load_state_dict(wide, strict=False, assign=True),
    ):
        with pytest.raises(
            RuntimeError,
            match=r"^1\.weight cannot become torch\.float64.* 648 bytes and need a staging of .*"
            r"made one of .* Convert the model before it is wrapped",
        ):
            convert()
        assert all(p is before[fqn] for fqn, p in model.named_parameters())
        assert all(p.dtype == torch.float32 for p in model.parameters())
    model.load_state_dict(wide, strict=False)  # which casts
    for dtype in (torch.bfloat16, torch.float32):
        model.to(dtype)(torch.ones(1, 1, 9, 9, dtype=dtype, device=device())).sum().backward()


@multi_world_sizes
@pytest.mark.parametrize("transport", ["ring", "auto" if DEVICE_TYPE == "cuda" else "peer"])
def test_a_dtype_whose_tiles_would_not_fit_is_refused_by_name(
    world_size: int, transport: str
) -> None:
    run_ranks(world_size, _check_room, transport, timeout=LIMIT)


def _check_loading() -> None:
    dense, model = _dense(), _wrap()
    torch.manual_seed(1)
    other = Net().to(device(), torch.float64)
    values = {fqn: p.detach().clone() for fqn, p in model.named_parameters()}
    wrong = {**other.state_dict(), "rotated.weight": torch.zeros(6, 8)}
    with pytest.raises(
        RuntimeError, match=r"size mismatch for rotated\.weight.*\[6, 8\].*\[8, 6\]"
    ):
        model.load_state_dict(wrong)
    for fqn, parameter in model.named_parameters():  # torch has loaded the others by then
        expected = values[fqn] if fqn == "rotated.weight" else None
        if isinstance(expected, DTensor):
            assert torch.equal(parameter.to_local(), expected.to_local())
    with pytest.raises(RuntimeError, match=r"Missing key.*rotated\.bias"):
        model.load_state_dict({k: v for k, v in other.state_dict().items() if k != "rotated.bias"})
    # A dense model's own tensors load: every rank takes its part, from any device, in any dtype.
    for assign in (False, True):
        model.load_state_dict({k: v.cpu() for k, v in dense.state_dict().items()})
        compare_weights(dense, model, {"rtol": 0.0, "atol": 0.0})
        model.load_state_dict(other.state_dict(), assign=assign)
        compare_weights(other, model, {"rtol": 0.0, "atol": 0.0})
        assert all(
            isinstance(p, DTensor) for n, p in model.named_parameters() if "ignored" not in n
        )
    copy, x = deepcopy(other), _x()  # the same on every rank
    for net in (copy, model):
        mean_square(net(x)).backward()
        # One by one: torch's grouped updates refuse ignored parameters beside the others.
        torch.optim.SGD(net.parameters(), lr=0.1, foreach=False).step()
    compare_gradients(copy, model, FP64)
    compare_weights(copy, model, FP64)


@all_world_sizes
def test_state_dicts_of_wrong_shapes_are_refused_and_dense_ones_loaded(world_size: int) -> None:
    run_ranks(world_size, _check_loading, timeout=LIMIT)


class Tied(nn.Module):
    """Uses a weight outside of the module that has it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8, bias=False)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self.norm(self.embed(x)), self.embed.weight.t())


def _check_outside() -> None:
    torch.manual_seed(0)
    dense = Tied().to(device(), torch.float64)
    model = RotatedTensorParallel(deepcopy(dense), policy=ShardingPolicy(replicate_below=9))
    x = _x()
    for net in (dense, model):
        mean_square(net(x)).backward()
    compare_gradients(dense, model, FP64)
    weight = model.embed.weight  # outside any forward it is the parameter, a DTensor
    assert isinstance(weight, DTensor)
    with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"):
        F.linear(x, weight)


@all_world_sizes
def test_a_weight_used_by_another_module_is_whole_there(world_size: int) -> None:
    run_ranks(world_size, _check_outside, timeout=LIMIT)
