"""The sharded operations, as functions: each holds its maths and its communication."""

from rtp_wrap.ops.linear import rotated_linear

__all__ = ["rotated_linear"]
