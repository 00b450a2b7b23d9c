"""Learn MNIST with FSDP2: every rank has 1/N of the weights, and gathers one layer at a time.

python benchmarks/fsdp_mnist.py                             every GPU, or two CPU ranks
torchrun --nproc_per_node=4 benchmarks/fsdp_mnist.py --data-dir mnist
"""

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from harness.mnist import ConvNet, main


def shard(model: ConvNet) -> nn.Module:
    """Every layer by itself, then what is left."""
    mesh = init_device_mesh(model.fc1.weight.device.type, (dist.get_world_size(),))
    for layer in (model.conv1, model.conv2, model.fc1, model.fc2):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


if __name__ == "__main__":
    main(__file__, "FSDP2", shard)
