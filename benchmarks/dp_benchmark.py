"""The original's language model with DistributedDataParallel: whole weights on every rank.

python benchmarks/dp_benchmark.py --use_synthetic_data
"""

from harness.language_model import main

if __name__ == "__main__":
    main("dp", __file__)
