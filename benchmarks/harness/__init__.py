"""What the benchmarks share; the Llama-shaped model and the built-in text are the examples'."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "examples"))
