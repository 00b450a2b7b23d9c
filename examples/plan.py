"""What wrapping an 8B model would do, on a laptop: no ranks, no GPU, no memory for the model.

python examples/plan.py --model 8b --ranks 8 --tokens 8192
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import rtp_wrap
from llama import SHAPES, Llama


def main() -> None:
    """Plan, print, and save as JSON if asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", choices=SHAPES, default="8b")
    parser.add_argument("--ranks", type=int, default=8, help="of a ring")
    parser.add_argument("--rings", type=int, default=1, help="that replicate each other")
    parser.add_argument("--tokens", type=int, default=8192, help="per rank and step")
    parser.add_argument("--param-dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--inplace", action="store_true", help="least staging, no overlap")
    parser.add_argument("--json", type=Path, help="where to save the plan, for the wrapper's plan=")
    arguments = parser.parse_args()
    with torch.device("meta"):
        model = Llama(SHAPES[arguments.model])
        tokens = torch.empty(1, arguments.tokens, dtype=torch.long)
    plan = rtp_wrap.plan(
        model,
        world_size=arguments.ranks,
        replicas=arguments.rings,
        mixed_precision=rtp_wrap.MixedPrecisionPolicy(
            param_dtype=getattr(torch, arguments.param_dtype)
        ),
        inplace=arguments.inplace,
        example_inputs=tokens,
    )
    print(plan)
    if arguments.json:
        arguments.json.write_text(plan.to_json())


if __name__ == "__main__":
    main()
