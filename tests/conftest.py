"""Settings of the whole test suite."""

from __future__ import annotations

import os
from collections import defaultdict
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings

from tests.ranks import DEVICE_TYPE, LAUNCHED, THOROUGH, WORLD_SIZES, shutdown

#: From so many cases on, they take turns at world sizes.
MANY_CASES = 4

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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of a test with many cases at all world sizes, run each case at every other size only.

    All sizes are still seen with half of the cases. RTP_TEST_EXAMPLES=10 runs everything.
    """
    if THOROUGH or len(WORLD_SIZES) < 3:
        return
    tests = defaultdict(list)
    for item in items:
        if isinstance(item, pytest.Function) and hasattr(item, "callspec"):
            params = dict(item.callspec.params)
            size = params.pop("world_size", None)
            tests[item.parent, item.originalname].append((item, size, repr(params)))
    dropped = set()
    for each in tests.values():
        sizes, cases = (list(dict.fromkeys(row[column] for row in each)) for column in (1, 2))
        if len(sizes) < 3 or len(cases) < MANY_CASES or len(each) < len(sizes) * len(cases):
            continue
        for item, size, case in each:
            # Not simply in turn, or one value of a parameter would always come with the same sizes.
            turn = cases.index(case).bit_count()
            if (sizes.index(size) + turn) % 2:
                dropped.add(item)
    config.hook.pytest_deselected(items=list(dropped))
    items[:] = [item for item in items if item not in dropped]


def pytest_sessionfinish() -> None:
    """End the ranks."""
    shutdown()
