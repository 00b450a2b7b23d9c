"""The functions that benchmarks/host_cost.py times are there, and are what they were afterwards."""

from __future__ import annotations

import host_cost
from harness import host_time
from harness.host_time import HostTime
from rtp_wrap.transport.lane import Lane


def test_what_is_timed_is_counted_and_put_back() -> None:
    before = [getattr(owner, name) for owner, name in host_time.TIMED]
    timers = host_time.Timers()
    with timers.running():
        assert [getattr(owner, name) for owner, name in host_time.TIMED] != before
        for _ in range(3):
            Lane.meet(_Lane())  # type: ignore[arg-type]
    assert [getattr(owner, name) for owner, name in host_time.TIMED] == before
    assert timers.calls == {"Lane.meet": 3}
    assert timers.seconds["Lane.meet"] > 0
    times = HostTime([], 2, timers.seconds, timers.calls)
    assert "| Lane.meet | 1.5 |" in host_cost.functions(times).markdown()


class _Lane:
    """Somebody to meet."""

    _flag = _index = 0
    stream = None

    @property
    def _memory(self) -> _Lane:
        return self

    def barrier(self, *args: object) -> None:
        pass
