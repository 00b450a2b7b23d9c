"""Settings of the whole test suite."""

from __future__ import annotations

import gc
import os
from collections import defaultdict
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings

from tests.ranks import DEVICE_TYPE, LAUNCHED, THOROUGH, WORLD_SIZES, shutdown

#: From so many cases on, each runs at half of the world sizes, or at one.
MANY_CASES, VERY_MANY_CASES = 2, 3

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
    """Of a test with many cases, run each case at some of its world sizes only.

    All sizes are still seen, with other cases each, and each case at one of several ranks, where
    there is something to go wrong. A test with one case runs at one size, in turn with the others,
    and every third one at a small and a large one. RTP_TEST_EXAMPLES=10 runs everything.
    """
    if THOROUGH or len(WORLD_SIZES) < 3:
        return
    tests: dict[Any, dict[str, list[pytest.Item]]] = defaultdict(lambda: defaultdict(list))
    for item in items:
        params = dict(item.callspec.params) if hasattr(item, "callspec") else {}
        if isinstance(item, pytest.Function) and params.pop("world_size", None) is not None:
            tests[item.parent, item.originalname][repr(params)].append(item)
    dropped: set[pytest.Item] = set()
    for number, cases in enumerate(tests.values()):
        for index, sizes in enumerate(cases.values()):
            # Not simply in turn, or one value of a parameter would always come with the same sizes.
            turn = index + index.bit_count()
            several = [each for each in sizes if each.callspec.params["world_size"] > 1]  # type: ignore[attr-defined]
            if len(cases) >= VERY_MANY_CASES and several:
                kept = several[turn % len(several)]
                dropped.update(each for each in several if each is not kept)
                if turn % 4:
                    dropped.update(each for each in sizes if each not in several)
            elif len(cases) >= MANY_CASES and len(sizes) > 2:
                dropped.update(sizes[turn % 2 :: 2])
            elif len(sizes) > 2:
                dropped.add(sizes[-1 - number % 2])
                if len(sizes) > 3:
                    dropped.add(sizes[number // 2 % 2])
                if number % 3:
                    kept = [each for each in sizes if each not in dropped]
                    dropped.add(kept[number // 3 % len(kept)])
    config.hook.pytest_deselected(items=list(dropped))
    items[:] = [item for item in items if item not in dropped]


def pytest_collection_finish() -> None:
    """Collections, of which some tests need many, would look at all that has been imported."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """End the ranks."""
    shutdown()
