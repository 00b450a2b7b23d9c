"""What moves tiles between ranks, and the memory they travel in."""

from rtp_wrap.transport.choice import candidates, likely, open_memory, wanted
from rtp_wrap.transport.p2p import PointToPoint
from rtp_wrap.transport.peer import PeerTransport
from rtp_wrap.transport.staging import Staging

__all__ = [
    "PeerTransport",
    "PointToPoint",
    "Staging",
    "candidates",
    "likely",
    "open_memory",
    "wanted",
]
