"""Learn MNIST with DDP: every rank has all weights.

python benchmarks/dp_mnist.py                               every GPU, or two CPU ranks
torchrun --nproc_per_node=4 benchmarks/dp_mnist.py --data-dir mnist
"""

from functools import partial

from torch.nn.parallel import DistributedDataParallel

from harness.mnist import main

if __name__ == "__main__":
    main(__file__, "DDP", partial(DistributedDataParallel, gradient_as_bucket_view=True))
