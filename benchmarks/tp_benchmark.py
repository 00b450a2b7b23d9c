"""The original's language model with DTensor tensor parallelism: activations travel.

python benchmarks/tp_benchmark.py --use_synthetic_data
"""

from harness.language_model import main

if __name__ == "__main__":
    main("tp", __file__)
