"""The record that an adopted module carries."""

from __future__ import annotations

from dataclasses import dataclass, field

from rtp_wrap.policy import MixedPrecisionPolicy, Strategy
from rtp_wrap.ring import Ring


@dataclass(frozen=True)
class Adoption:
    """What an adopted module knows: its ring, its fqn and what becomes of its own parameters."""

    ring: Ring
    fqn: str
    strategies: dict[str, Strategy]
    #: In which the module's own parameters compute; other than the ring's for some norms.
    precision: MixedPrecisionPolicy
    #: Whether this is the wrapped model itself. In a compiled graph, where an fqn must not be asked
    #: for: the graph would be that of one layer only.
    at_root: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "at_root", not self.fqn)

    def name(self, parameter: str) -> str:
        return f"{self.fqn}.{parameter}" if self.fqn else parameter
