"""The one line: ``RotatedTensorParallel(model)``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from rtp_wrap.home import settle, settle_buffer
from rtp_wrap.modules import Adopted, Adoption, adopt, form_of
from rtp_wrap.plan import ParameterPlan, plan_parameters
from rtp_wrap.policy import Ignore, Replicate, Rotate, Rules, ShardingPolicy, Strategy
from rtp_wrap.ring import Ring
from rtp_wrap.shard import TileGrid
from rtp_wrap.transport import Staging

#: Default staging, bytes per rank: two tiles of 64 MiB in forward, four of 32 MiB in backward.
STAGING_BYTES = 128 << 20
#: Default with ``inplace=True``: two tiles of 8 MiB in forward, three of 5 in backward.
INPLACE_STAGING_BYTES = 16 << 20

_SHARED = ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules")


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

    Attributes and methods of ``module`` are reachable, fqns in ``named_parameters()`` and
    ``state_dict()`` are the module's own.

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
        device = _device(mesh, module, plans)
        staging = _staging_bytes(plans, mesh.size(), policy, inplace)
        ring = Ring(mesh, device, staging, overlap=not inplace)
        _check_same_everywhere(module, plans, ring)
        _settle(module, plans, ring)
        _adopt(module, plans, ring)
        super().__init__()
        for name in (*_SHARED, "module"):
            vars(self)[name] = vars(module).get(name, module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "module" not in vars(self):  # a copy in the making
                raise
            return getattr(self.module, name)

    @property
    def training(self) -> bool:
        return self.module.training

    @training.setter
    def training(self, mode: bool) -> None:
        if "module" in vars(self):  # nn.Module's constructor sets it first
            self.module.training = mode

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.load_state_dict(*args, **kwargs)

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


def _mesh(group: dist.ProcessGroup | None, mesh: DeviceMesh | None) -> DeviceMesh:
    if not dist.is_initialized():
        raise RuntimeError(
            "RotatedTensorParallel needs a process group: start with torchrun and call "
            "torch.distributed.init_process_group() before wrapping"
        )
    if mesh is not None:
        if group is not None:
            raise ValueError("give either group or mesh, not both")
        if mesh.ndim != 1:
            raise ValueError(
                f"mesh has the dimensions {mesh.mesh_dim_names or mesh.shape}: give the 1-D slice "
                f'to shard over, for example mesh["rtp"]'
            )
        return mesh
    group = group if group is not None else dist.group.WORLD
    if not isinstance(group, dist.ProcessGroup) or group.rank() < 0:
        raise ValueError(f"rank {dist.get_rank()} is not in the group it was given")
    backends = dist.get_backend_config(group)
    on_cuda = torch.cuda.is_available() and "nccl" in str(backends)
    return DeviceMesh.from_group(group, "cuda" if on_cuda else "cpu", mesh_dim_names=("rtp",))


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
    ring.lockstep.verify("wrapping")


def _settle(module: nn.Module, plans: list[ParameterPlan], ring: Ring) -> None:
    """Replace parameters and buffers by rank 0's, one at a time.

    The plans take over the new parameters, so that each old one can be freed before the next.
    """
    for index, plan in enumerate(plans):
        if isinstance(plan.home, Ignore):
            continue
        settled = settle(plan.parameter, plan.home, ring)
        for use in plan.uses:
            use.module._parameters[use.name] = settled
        plans[index] = replace(plan, parameter=settled)
        del plan
    for inner in module.modules():
        for name, buffer in inner._buffers.items():
            if buffer is not None:
                inner._buffers[name] = settle_buffer(buffer, ring)


def _adopt(module: nn.Module, plans: list[ParameterPlan], ring: Ring) -> None:
    """Adopt every module that has managed parameters at or below it."""
    strategies: dict[nn.Module, dict[str, Strategy]] = {}
    for plan in plans:
        for use in plan.uses:
            if not isinstance(use.strategy, Ignore):
                strategies.setdefault(use.module, {})[use.name] = use.strategy
    for fqn, inner in module.named_modules():
        below = [each for each in inner.modules() if each in strategies]
        if below:
            replicas = [
                (each, name)
                for each in below
                for name, strategy in strategies[each].items()
                if isinstance(strategy, Replicate)
            ]
            adoption = Adoption(ring, fqn, strategies.get(inner, {}), replicas)
            adopt(inner, adoption, form_of(inner, adoption))
