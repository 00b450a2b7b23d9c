"""What is compared: one model, prepared for training in different ways.

Every strategy gets the model on the meta device and materialises it piece by piece, so that none
needs more memory at the start than in the step, and all start from the same weights.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy as FSDP2MixedPrecisionPolicy
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import loss_parallel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from harness.models import initialise, materialise
from harness.tensor_parallel import parallelize
from rtp_wrap import MixedPrecisionPolicy, RotatedTensorParallel, ShardingPolicy

#: The parameters' dtype per ``--precision``; "mixed" computes in bf16 and reduces in fp32.
PRECISIONS = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "mixed": torch.float32,
}


@dataclass(frozen=True)
class Setting:
    """How a model is to be trained, whatever the strategy."""

    precision: str = "fp32"
    compile: bool = False
    checkpointing: bool = False
    staging_mib: int | None = None

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision {self.precision!r} is none of {', '.join(PRECISIONS)}")

    @property
    def mixed(self) -> bool:
        return self.precision == "mixed"

    @property
    def dtype(self) -> torch.dtype:
        """The parameters'."""
        return PRECISIONS[self.precision]

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of what products multiply."""
        return torch.bfloat16 if self.mixed else self.dtype


#: Of the hybrid strategies: halves of the machine that replicate each other, as hosts would.
RINGS = 2

Prepare = Callable[[nn.Module, Setting, torch.device], nn.Module]


@dataclass(frozen=True)
class Strategy:
    """``shares_batch``: all ranks work on one batch of ``N`` times the size, not each on its own.

    ``autocast``: mixed precision is autocast's, since the strategy has none of its own.
    ``graphed``: a step is one CUDA graph.
    """

    name: str
    label: str
    prepare: Prepare
    shares_batch: bool = False
    autocast: bool = False
    graphed: bool = False

    def loss(self) -> AbstractContextManager[object]:
        """Around the loss and its backward."""
        return loss_parallel() if self.shares_batch else nullcontext()

    def forward(self, setting: Setting, device: torch.device) -> AbstractContextManager[object]:
        """Around the forward."""
        enabled = self.autocast and setting.mixed
        return torch.autocast(device.type, torch.bfloat16) if enabled else nullcontext()


def apply(
    strategy: Strategy, model: nn.Module, setting: Setting, device: torch.device
) -> nn.Module:
    """Dtype, checkpointing and compilation, then the strategy."""
    model.to(setting.dtype)
    for block in model.blocks:  # type: ignore[union-attr]
        if setting.checkpointing:
            block.forward = _checkpointed(block.forward)
        if setting.compile:
            block.compile()
    return strategy.prepare(model, setting, device)


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    # A function of ours: a compiler would not look into one of torch's, and so not into the block.
    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run


def _plain(model: nn.Module, setting: Setting, device: torch.device) -> nn.Module:
    materialise(model, "", device)
    return model


def _ddp(model: nn.Module, setting: Setting, device: torch.device) -> nn.Module:
    materialise(model, "", device)
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def _mesh(device: torch.device, rings: int = 1) -> DeviceMesh:
    """All ranks, in so many rings; 2-D if they are several."""
    world_size = dist.get_world_size()
    if rings == 1:
        return init_device_mesh(device.type, (world_size,))
    if world_size % rings:
        raise ValueError(f"{world_size} ranks are not {rings} rings of equal length")
    shape = rings, world_size // rings
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))


def _fsdp2(
    model: nn.Module,
    setting: Setting,
    device: torch.device,
    per_block: bool = True,
    rings: int = 1,
) -> nn.Module:
    # What the root returns is a view of the head's product, which nobody writes to.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    mesh = _mesh(device, rings)
    policy = FSDP2MixedPrecisionPolicy()
    if setting.mixed:
        policy = FSDP2MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    shard = functools.partial(fully_shard, mesh=mesh, mp_policy=policy)
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleList):
            for index, block in enumerate(child):
                materialise(block, f"{name}.{index}", device)
                if per_block:
                    shard(block)
        else:
            materialise(child, name, device)
    shard(model)
    return model


def _tensor_parallel(model: nn.Module, setting: Setting, device: torch.device) -> nn.Module:
    parallelize(model, _mesh(device), functools.partial(materialise, device=device))
    return model


def _rtp(
    model: nn.Module,
    setting: Setting,
    device: torch.device,
    inplace: bool = False,
    transport: str = "auto",
    rings: int = 1,
) -> nn.Module:
    names = {module: fqn for fqn, module in model.named_modules()}
    return RotatedTensorParallel(
        model,
        inplace=inplace,
        mesh=None if rings == 1 else _mesh(device, rings),  # as a user has it
        param_init_fn=lambda module: initialise(module, names[module]),
        **rtp_options(setting, transport),
    )


def rtp_options(setting: Setting, transport: str = "auto") -> dict[str, Any]:
    """What ``RotatedTensorParallel`` and ``rtp_wrap.plan`` are told of ``setting``."""
    staging = None if setting.staging_mib is None else setting.staging_mib << 20
    policy = ShardingPolicy(staging_bytes=staging, transport=transport)
    precision = MixedPrecisionPolicy()
    if setting.mixed:
        precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return {"policy": policy, "mixed_precision": precision}


_ALL = (
    Strategy("single", "one rank", _plain, autocast=True),
    Strategy("dp", "DDP", _ddp, autocast=True),
    Strategy("fsdp-root", "FSDP2, root only", functools.partial(_fsdp2, per_block=False)),
    Strategy("fsdp", "FSDP2 per block", _fsdp2),
    Strategy("fsdp-hybrid", "FSDP2 per block, two rings", functools.partial(_fsdp2, rings=RINGS)),
    Strategy("tp", "DTensor TP + SP", _tensor_parallel, shares_batch=True, autocast=True),
    Strategy("rtp", "rtp_wrap", _rtp),
    Strategy("rtp-graph", "rtp_wrap, a step as one CUDA graph", _rtp, graphed=True),
    Strategy("rtp-ring", "rtp_wrap, by hops", functools.partial(_rtp, transport="ring")),
    Strategy("rtp-inplace", "rtp_wrap, in place", functools.partial(_rtp, inplace=True)),
    Strategy("rtp-hybrid", "rtp_wrap, two rings", functools.partial(_rtp, rings=RINGS)),
)
STRATEGIES = {strategy.name: strategy for strategy in _ALL}


def rings_of(strategy: str) -> int:
    """How many rings the strategy of this name makes of all ranks."""
    return RINGS if strategy.endswith("-hybrid") else 1
