"""The original's language model with rtp_wrap: shards of weights travel.

python benchmarks/rtp_benchmark.py --use_synthetic_data
"""

from harness.language_model import main

if __name__ == "__main__":
    main("rtp", __file__)
