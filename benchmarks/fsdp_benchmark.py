"""The original's language model with fully_shard: whole blocks, gathered for their turn.

python benchmarks/fsdp_benchmark.py --use_synthetic_data
"""

from harness.language_model import main

if __name__ == "__main__":
    main("fsdp", __file__)
