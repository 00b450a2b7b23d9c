"""The sharded operations, as functions: each holds its maths and its communication."""

from rtp_wrap.ops.conv import rotated_conv
from rtp_wrap.ops.embedding import rotated_embedding
from rtp_wrap.ops.linear import rotated_linear, rotated_projections

__all__ = ["rotated_conv", "rotated_embedding", "rotated_linear", "rotated_projections"]
