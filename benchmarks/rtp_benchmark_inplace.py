"""The original's language model with rtp_wrap in place: shards travel, least staging.

python benchmarks/rtp_benchmark_inplace.py --use_synthetic_data
"""

from harness.language_model import main

if __name__ == "__main__":
    main("rtp-inplace", __file__)
