"""The strategies that the original compared itself with, of the optional package fairscale 0.4.13.

Importing this raises ``ImportError`` without it. Its FSDP runs on CUDA only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from fairscale.nn.data_parallel import FullyShardedDataParallel
from fairscale.nn.model_parallel import initialize_model_parallel
from fairscale.nn.model_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import nn

from harness.models import materialise
from harness.strategies import PRECISIONS, Setting, Strategy

#: Linears of either model's block, by which of their dimensions is cut; their outputs and inputs
#: stay cut.
COLUMNS = ("attention.q", "attention.k", "attention.v", "gate", "up", "mlp.0")
ROWS = ("attention.out", "down", "mlp.3")


def _fsdp(
    model: nn.Module, setting: Setting, device: torch.device, per_block: bool = True
) -> nn.Module:
    wrap = functools.partial(FullyShardedDataParallel, compute_dtype=PRECISIONS[setting.precision])
    if setting.mixed:
        wrap = functools.partial(
            FullyShardedDataParallel,
            mixed_precision=True,
            compute_dtype=torch.bfloat16,
            fp32_reduce_scatter=True,
        )
    for fqn, part in _parts(model):
        materialise(part, fqn, device)
        if per_block and fqn.startswith("blocks."):
            model.set_submodule(fqn, wrap(part))
    return wrap(model)


def _tensor_parallel(model: nn.Module, setting: Setting, device: torch.device) -> nn.Module:
    initialize_model_parallel(dist.get_world_size())
    for fqn, part in _parts(model):
        materialise(part, fqn, device)
        for name, dense in list(part.named_modules()):
            if name in COLUMNS:
                kind = functools.partial(ColumnParallelLinear, gather_output=False)
            elif name in ROWS:
                kind = functools.partial(RowParallelLinear, input_is_parallel=True)
            else:
                continue
            assert isinstance(dense, nn.Linear)
            part.set_submodule(name, _cut(dense, kind))
    return model


def _cut(dense: nn.Linear, kind: Callable[..., nn.Module]) -> nn.Module:
    """This rank's part; biases are zero at the beginning, here as there."""
    weight = dense.weight.detach()
    with torch.no_grad():
        part = kind(
            dense.in_features,
            dense.out_features,
            bias=dense.bias is not None,
            init_method=lambda whole: whole.copy_(weight),
        )
    return part.to(weight)


def _parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Children, and blocks in place of their list."""
    for name, child in list(model.named_children()):
        if isinstance(child, nn.ModuleList):
            yield from ((f"{name}.{index}", block) for index, block in enumerate(list(child)))
        else:
            yield name, child


#: By the name of the strategy whose place they take.
PEERS = {
    "fsdp": Strategy("fairscale-fsdp", "fairscale's FSDP per block", _fsdp),
    "fsdp-root": Strategy(
        "fairscale-fsdp-root",
        "fairscale's FSDP, root only",
        functools.partial(_fsdp, per_block=False),
    ),
    "tp": Strategy(
        "fairscale-tp",
        "fairscale's model parallel layers",
        _tensor_parallel,
        shares_batch=True,
        autocast=True,
    ),
}
