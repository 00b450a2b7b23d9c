"""The schedule, without devices: who meets what, when."""

from __future__ import annotations

import pytest

from rtp_wrap.rotation import Step, schedule

world_sizes = pytest.mark.parametrize("n", range(1, 10))


def _by_rank(n: int) -> list[list[Step]]:
    return [list(schedule(rank, n)) for rank in range(n)]


def test_four_ranks_do_what_the_docstring_draws() -> None:
    assert [[(s.tile, s.accumulator) for s in steps] for steps in _by_rank(4)] == [
        [(0, 1), (1, 2), (2, 3), (3, 0)],
        [(1, 2), (2, 3), (3, 0), (0, 1)],
        [(2, 3), (3, 0), (0, 1), (1, 2)],
        [(3, 0), (0, 1), (1, 2), (2, 3)],
    ]


def test_one_rank_has_one_step_without_hops() -> None:
    (step,) = schedule(0, 1)
    assert step == Step(tile=0, next_tile=None, accumulator=0, first=True)
    assert step.last


@world_sizes
def test_every_rank_meets_every_owner_once_and_itself_first(n: int) -> None:
    for rank, steps in enumerate(_by_rank(n)):
        assert steps[0].tile == rank
        assert sorted(step.tile for step in steps) == list(range(n))


@world_sizes
def test_what_a_rank_needs_next_is_what_the_rank_above_has_now(n: int) -> None:
    ranks = _by_rank(n)
    for rank, steps in enumerate(ranks):
        above = ranks[(rank + 1) % n]
        for now, (step, theirs) in enumerate(zip(steps[:-1], above, strict=False)):
            assert step.next_tile == theirs.tile
            assert steps[now + 1].tile == step.next_tile


@world_sizes
def test_an_accumulator_comes_from_the_rank_above_that_had_it_before(n: int) -> None:
    ranks = _by_rank(n)
    for rank, steps in enumerate(ranks):
        above = ranks[(rank + 1) % n]
        for now in range(1, n):
            assert steps[now].accumulator == above[now - 1].accumulator


@world_sizes
def test_an_accumulator_visits_every_rank_once_and_ends_at_its_owner(n: int) -> None:
    ranks = _by_rank(n)
    for owner in range(n):
        visits = [
            (now, rank) for rank in range(n) for now in range(n)
            if ranks[rank][now].accumulator == owner
        ]  # fmt: skip
        visits.sort()
        assert [now for now, _ in visits] == list(range(n))
        assert sorted(rank for _, rank in visits) == list(range(n))
        assert visits[0] == (0, (owner - 1) % n)
        assert visits[-1] == (n - 1, owner)


@world_sizes
def test_the_first_and_the_last_step_know_it(n: int) -> None:
    for steps in _by_rank(n):
        assert [step.first for step in steps] == [True] + [False] * (n - 1)
        assert [step.last for step in steps] == [False] * (n - 1) + [True]
        assert [step.next_tile is None for step in steps] == [step.last for step in steps]
