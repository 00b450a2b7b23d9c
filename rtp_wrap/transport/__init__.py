"""What moves tiles between ranks, and the memory they travel in."""

from rtp_wrap.transport.p2p import PointToPoint
from rtp_wrap.transport.staging import Staging

__all__ = ["PointToPoint", "Staging"]
