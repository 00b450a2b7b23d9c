"""Settings of the whole test suite."""

from __future__ import annotations

import os
from typing import Any

from hypothesis import HealthCheck, Phase, settings

from tests.ranks import DEVICE_TYPE, LAUNCHED, WORLD_SIZES, shutdown

# Launched ranks must draw the same examples, and a failure costs them their group, so that they do
# not look for a smaller example. RTP_TEST_EXAMPLES=10 draws ten times as many.
_in_step: dict[str, Any] = (
    {"derandomize": True, "database": None, "phases": [Phase.explicit, Phase.generate]}
    if LAUNCHED
    else {}
)
settings.register_profile(
    "ranks",
    max_examples=max(1, round(25 * float(os.environ.get("RTP_TEST_EXAMPLES", "1")))),
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    **_in_step,
)
settings.load_profile("ranks")


def pytest_report_header() -> str:
    """Say where the ranks run."""
    return f"ranks: {DEVICE_TYPE}, world sizes {WORLD_SIZES}"


def pytest_sessionfinish() -> None:
    """End the ranks."""
    shutdown()
