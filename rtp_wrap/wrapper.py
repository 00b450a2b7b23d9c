"""The one line: ``RotatedTensorParallel(model)``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from rtp_wrap.home import settle, settle_buffer
from rtp_wrap.modules import Adopted, Adoption, adopt, form_of
from rtp_wrap.plan import ParameterPlan, plan_parameters
from rtp_wrap.policy import Ignore, Rotate, Rules, ShardingPolicy, Strategy
from rtp_wrap.ring import Ring, retire, was_retired
from rtp_wrap.shard import TileGrid
from rtp_wrap.transport import Staging

#: Default staging, bytes per rank: two tiles of 64 MiB in forward, four of 32 MiB in backward.
STAGING_BYTES = 128 << 20
#: Default with ``inplace=True``: two tiles of 8 MiB in forward, three of 5 in backward.
INPLACE_STAGING_BYTES = 16 << 20

#: What the wrapper has in common with the wrapped model: the same dictionaries.
_SHARED = (
    "_parameters",
    "_buffers",
    "_non_persistent_buffers_set",
    "_modules",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def _models_own(name: str) -> Callable[..., Any]:
    """A method of every ``nn.Module`` that models override: the wrapped model's own is called."""

    @functools.wraps(getattr(nn.Module, name))
    def method(self: RotatedTensorParallel, *args: Any, **kwargs: Any) -> Any:
        result = getattr(self.module, name)(*args, **kwargs)
        return self if result is self.module else result

    return method


class RotatedTensorParallel(nn.Module):
    """Train ``module`` with 1/N of every weight on each of N ranks, and DDP's results.

    ``module`` is changed in place: its parameters become DTensors that hold this rank's home shard
    of rank 0's values, on the ring's device, and its layers compute on rotating or gathered
    weights. Every rank calls this with the same module and policy, then feeds its own batch;
    gradients are averaged over the ranks. Build the optimizer afterwards, from ``parameters()``.

    ``group``
        the process group to shard over; default: all ranks.
    ``inplace``
        least staging: transfers do not overlap with the computation.
    ``mesh``
        a 1-D ``DeviceMesh`` (or a 1-D slice of a larger one) instead of ``group``.
    ``policy``
        a ``ShardingPolicy``, or just its rules.

    Attributes and methods of ``module`` are reachable, and what is set on the wrapper is set on
    ``module``; fqns in ``named_parameters()`` and ``state_dict()`` are the module's own. Hooks
    registered on the wrapper run around calls of the wrapper.

    Raises ``RuntimeError`` without a process group, and ``ValueError`` or ``TypeError`` for
    arguments, policies and models that cannot be used; nothing is changed then.
    """

    module: nn.Module

    def __init__(
        self,
        module: nn.Module,
        group: dist.ProcessGroup | None = None,
        inplace: bool = False,
        *,
        mesh: DeviceMesh | None = None,
        policy: ShardingPolicy | Rules | None = None,
    ) -> None:
        _check_module(module)
        policy = ShardingPolicy.of(policy)
        mesh = _mesh(group, mesh)
        plans = plan_parameters(module, policy)
        _check_plans(plans)
        device = _device(mesh, module, plans)
        staging = _staging_bytes(plans, mesh.size(), policy, inplace)
        ring = Ring(mesh, device, staging, overlap=not inplace)
        _check_same_everywhere(module, plans, ring)
        _settle(module, plans, ring)
        _adopt(module, plans, ring)
        super().__init__()
        for name in (*_SHARED, "module"):
            vars(self)[name] = vars(module).get(name, module)
        vars(self)["_ring"] = ring

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    @property
    def staging_bytes(self) -> int:
        """Memory for tiles in flight, in bytes on this rank: all layers' together, and constant."""
        ring: Ring = vars(self)["_ring"]
        return ring.staging.nbytes

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "module" not in vars(self):  # a copy in the making
                raise
            return getattr(self.module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if "module" not in vars(self) or name in vars(self) or hasattr(type(self), name):
            super().__setattr__(name, value)
        else:  # set where the model's own code reads it
            setattr(self.module, name, value)

    def __delattr__(self, name: str) -> None:
        if name in vars(self):
            super().__delattr__(name)
        else:
            delattr(self.module, name)

    def __getitem__(self, key: Any) -> Any:
        return self.module[key]  # type: ignore[index]

    @property
    def training(self) -> bool:
        return self.module.training

    @training.setter
    def training(self, mode: bool) -> None:
        if "module" in vars(self):  # nn.Module's constructor sets it first
            self.module.training = mode

    train = _models_own("train")
    eval = _models_own("eval")
    apply = _models_own("apply")
    zero_grad = _models_own("zero_grad")
    requires_grad_ = _models_own("requires_grad_")
    get_submodule = _models_own("get_submodule")
    state_dict = _models_own("state_dict")
    load_state_dict = _models_own("load_state_dict")
    # What `to`, `half` and the like do, and what loading into a larger module does.
    _apply = _models_own("_apply")
    _load_from_state_dict = _models_own("_load_from_state_dict")

    def extra_repr(self) -> str:
        return f"wrapping {type(self.module).__name__}"


def _check_module(module: nn.Module) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"RotatedTensorParallel wraps an nn.Module, not {type(module).__name__}")
    for fqn, inner in module.named_modules():
        if isinstance(inner, RotatedTensorParallel | Adopted):
            raise ValueError(
                f"{fqn or 'the model'} is wrapped already: wrap the outermost module, once"
            )
    for fqn, parameter in module.named_parameters():
        if isinstance(parameter, DTensor):
            raise ValueError(
                f"{fqn} is a DTensor: wrap the model before other parallelism shards it"
            )
        if was_retired(parameter):
            raise ValueError(
                f"{fqn} is tied to a model that was wrapped before: put both models into one "
                f"module and wrap that"
            )
    for fqn, buffer in module.named_buffers():
        if buffer.is_meta:
            raise ValueError(f"{fqn} is on the meta device: give it values before wrapping")


def _check_plans(plans: list[ParameterPlan]) -> None:
    for plan in plans:
        for use in plan.uses:
            if isinstance(use.module, torch.jit.ScriptModule) and use.strategy != Ignore():
                raise TypeError(
                    f"{use.fqn} belongs to a TorchScript module, whose forward cannot see sharded "
                    f"parameters: wrap the Python module it was made from, or Ignore() it"
                )


def _mesh(group: dist.ProcessGroup | None, mesh: DeviceMesh | None) -> DeviceMesh:
    if not dist.is_initialized():
        raise RuntimeError(
            "RotatedTensorParallel needs a process group: start with torchrun and call "
            "torch.distributed.init_process_group() before wrapping"
        )
    if mesh is not None:
        if group is not None:
            raise ValueError("give either group or mesh, not both")
        if not isinstance(mesh, DeviceMesh):
            raise TypeError(f"mesh is a {type(mesh).__name__}, not a DeviceMesh")
        if mesh.ndim != 1:
            raise ValueError(
                f"mesh has the dimensions {mesh.mesh_dim_names or mesh.shape}: give the 1-D slice "
                f'to shard over, for example mesh["rtp"]'
            )
        if mesh.get_coordinate() is None:
            raise ValueError(f"rank {dist.get_rank()} is not in the mesh: wrap on its ranks only")
        return mesh
    group = group if group is not None else dist.group.WORLD
    outside: object = dist.GroupMember.NON_GROUP_MEMBER
    if group is outside:
        raise ValueError(f"rank {dist.get_rank()} is not in the group: wrap on its ranks only")
    if not isinstance(group, dist.ProcessGroup):
        hint = ": give it as mesh=" if isinstance(group, DeviceMesh) else ""
        raise TypeError(f"group is a {type(group).__name__}, not a ProcessGroup{hint}")
    on_cuda = torch.cuda.is_available() and "nccl" in str(dist.get_backend_config(group))
    # Named after the group: torch takes meshes of the same ranks and names for one, and remembers
    # them, so that a DTensor could end up with the mesh of another (or a destroyed) group.
    name = f"rtp:{group.group_name}"
    return DeviceMesh.from_group(group, "cuda" if on_cuda else "cpu", mesh_dim_names=(name,))


def _device(mesh: DeviceMesh, module: nn.Module, plans: list[ParameterPlan]) -> torch.device:
    """Where home shards live: this rank's device of the mesh's type."""
    kind = mesh.device_type
    device = (
        torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)
    )
    for plan in plans:
        if plan.parameter.device.type not in ("cpu", kind):
            raise ValueError(
                f"{plan.fqn} is on {plan.parameter.device}, but the group's backend moves {kind} "
                f"tensors: initialise it with the backend for that device (NCCL for CUDA)"
            )
    return device


def _staging_bytes(
    plans: list[ParameterPlan], world_size: int, policy: ShardingPolicy, inplace: bool
) -> int:
    """The policy's staging, or what the largest rotated layer can use if that is less."""
    limit = policy.staging_bytes or (INPLACE_STAGING_BYTES if inplace else STAGING_BYTES)
    largest = 0
    for plan in plans:
        if isinstance(plan.home, Rotate) and world_size > 1:
            rows, cols = plan.parameter.shape
            grid = TileGrid((rows, cols), plan.home.dim, world_size, 1)
            largest = max(largest, grid.shard(0).numel * plan.parameter.itemsize)
    return min(limit, 4 * (largest + Staging.ALIGNMENT)) if largest else 0


def _check_same_everywhere(module: nn.Module, plans: list[ParameterPlan], ring: Ring) -> None:
    """Ranks with another model or policy would hang or mix up weights; they get an error here."""
    for plan in plans:
        parameter = plan.parameter
        ring.lockstep.record(
            f"parameter {plan.fqn} {tuple(parameter.shape)} {parameter.dtype} {plan.home} "
            f"{[use.fqn for use in plan.uses]} requires_grad={parameter.requires_grad}"
        )
    for fqn, buffer in module.named_buffers():
        ring.lockstep.record(f"buffer {fqn} {tuple(buffer.shape)} {buffer.dtype}")
    ring.lockstep.record(f"staging of {ring.staging.nbytes} bytes, overlap={ring.overlap}")
    ring.lockstep.verify("wrapping", "Wrap the same model with the same policy on every rank")


def _settle(module: nn.Module, plans: list[ParameterPlan], ring: Ring) -> None:
    """Replace parameters and buffers by rank 0's, one at a time.

    The plans take over the new parameters, so that each old one can be freed before the next.
    """
    for index, plan in enumerate(plans):
        if isinstance(plan.home, Ignore):
            continue
        settled = settle(plan.parameter, plan.home, ring)
        retire(plan.parameter, plan.fqn)
        for use in plan.uses:
            use.module._parameters[use.name] = settled
        plans[index] = replace(plan, parameter=settled)
        del plan
    buffers: dict[torch.Tensor, torch.Tensor] = {}  # tensors are keys by identity: ties stay
    for inner in module.modules():
        for name, buffer in inner._buffers.items():
            if buffer is not None:
                if buffer not in buffers:
                    buffers[buffer] = settle_buffer(buffer, ring)
                inner._buffers[name] = buffers[buffer]


def _adopt(module: nn.Module, plans: list[ParameterPlan], ring: Ring) -> None:
    """Adopt every module that has managed parameters at or below it."""
    strategies: dict[nn.Module, dict[str, Strategy]] = {}
    for plan in plans:
        for use in plan.uses:
            if not isinstance(use.strategy, Ignore):
                strategies.setdefault(use.module, {})[use.name] = use.strategy
    for fqn, inner in module.named_modules():
        if any(each in strategies for each in inner.modules()):
            adoption = Adoption(ring, fqn, strategies.get(inner, {}))
            adopt(inner, adoption, form_of(inner, adoption))
