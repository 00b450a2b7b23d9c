"""The results are those of DistributedDataParallel and of FSDP2, step by step."""

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
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from rtp_wrap import RotatedTensorParallel, ShardingPolicy
from tests.parity import FP64, full, fulls
from tests.ranks import DEVICE_TYPE, all_world_sizes, device, run_ranks


class Net(nn.Module):
    """A transformer layer between an embedding and a head; its eval mode has a fast path."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 13)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(self.embed(ids)))


def _ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def _fsdp2(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh(DEVICE_TYPE, (dist.get_world_size(),))
    fully_shard(model.layer, mesh=mesh)  # type: ignore[arg-type]
    fully_shard(model, mesh=mesh)
    return model


PEERS: dict[str, Callable[[nn.Module], nn.Module]] = {"DDP": _ddp, "FSDP2": _fsdp2}


def _compare(
    theirs: nn.Module, wrapped: nn.Module, value: Callable[[Any], torch.Tensor], when: str
) -> None:
    """Of every parameter, which have equal names; all of them have gradients."""
    expected, found = (
        {fqn.removeprefix("module."): value(p) for fqn, p in model.named_parameters()}
        for model in (theirs, wrapped)
    )
    assert list(found) == list(expected)
    assert not any(each is None for each in [*expected.values(), *found.values()])
    wholes = zip(found, fulls(found.values()), fulls(expected.values()), strict=True)
    for fqn, our, their in wholes:
        torch.testing.assert_close(our, their, **FP64, msg=f"{when} of {fqn}")


def _same_training(peer: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = Net().to(device(), torch.float64)
    wrapped = RotatedTensorParallel(deepcopy(model), **options)
    theirs = PEERS[peer](model)
    # SGD: the bias of the keys has no gradient but noise, which Adam would make as large as others.
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (theirs, wrapped)]
    torch.manual_seed(1 + dist.get_rank())  # every rank its own data
    for step in range(3):
        for _ in range(1 + step % 2):  # with and without accumulation
            ids = torch.randint(13, (3, 5), device=device())
            for m in (theirs, wrapped):
                nn.functional.cross_entropy(
                    m(ids).flatten(0, 1), ids.roll(1, 1).flatten()
                ).backward()
        _compare(theirs, wrapped, lambda parameter: parameter.grad, f"step {step}: gradient")
        norms = [torch.nn.utils.clip_grad_norm_(m.parameters(), 0.5) for m in (theirs, wrapped)]
        torch.testing.assert_close(full(norms[1]), full(norms[0]), **FP64)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        _compare(theirs, wrapped, torch.Tensor.detach, f"step {step}: weight")
    theirs.eval()
    wrapped.eval()
    with torch.no_grad():
        torch.testing.assert_close(wrapped(ids), theirs(ids), **FP64)


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "everything sharded": {"policy": ShardingPolicy(replicate_below=0)},
    "inplace": {"policy": ShardingPolicy(replicate_below=0), "inplace": True},
}


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view:UserWarning")
@all_world_sizes
@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("options", OPTIONS)
def test_training_is_the_same(world_size: int, peer: str, options: str) -> None:
    run_ranks(world_size, _same_training, peer, OPTIONS[options])
