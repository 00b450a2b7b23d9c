"""Rotated tensor parallelism for PyTorch: the memory of 1/N, and DDP's results.

Up to the order in which floating-point numbers are added.
"""

from rtp_wrap.lockstep import OutOfStepError
from rtp_wrap.methods import register_forward_method
from rtp_wrap.planned import Plan
from rtp_wrap.planner import plan
from rtp_wrap.policy import (
    Gather,
    Ignore,
    MixedPrecisionPolicy,
    Replicate,
    Rotate,
    ShardingPolicy,
)
from rtp_wrap.wrapper import RotatedTensorParallel

__all__ = [
    "Gather",
    "Ignore",
    "MixedPrecisionPolicy",
    "OutOfStepError",
    "Plan",
    "Replicate",
    "Rotate",
    "RotatedTensorParallel",
    "ShardingPolicy",
    "plan",
    "register_forward_method",
]
__version__ = "0.1.0"
