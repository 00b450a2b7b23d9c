"""Learn MNIST with rtp_wrap: every rank has 1/N of the weights, which pass by in turns.

python benchmarks/rtp_mnist.py                              every GPU, or two CPU ranks
torchrun --nproc_per_node=4 benchmarks/rtp_mnist.py --data-dir mnist
"""

from harness.mnist import main
from rtp_wrap import RotatedTensorParallel

if __name__ == "__main__":
    main(__file__, "rtp_wrap", RotatedTensorParallel)
