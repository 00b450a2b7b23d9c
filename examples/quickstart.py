"""The shortest use, on CPU or GPU: `torchrun --nproc_per_node=2 examples/quickstart.py`."""

import torch
import torch.distributed as dist
from torch import nn

from rtp_wrap import RotatedTensorParallel

dist.init_process_group()
if torch.cuda.is_available():
    torch.cuda.set_device(dist.get_node_local_rank())
torch.manual_seed(dist.get_rank())  # every rank has its own data
dense = nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256))
model = RotatedTensorParallel(dense)  # and, from here on, 1/N of rank 0's weights
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
x = torch.randn(64, 256, device=next(model.parameters()).device)
for step in range(20):
    loss = nn.functional.mse_loss(model(x), x.roll(1, dims=1))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step} rank {dist.get_rank()} loss {loss.item():.4f}")
dist.destroy_process_group()
