"""Tests of the test harness `tests.ranks`."""

from __future__ import annotations

import os
import time
import warnings
from dataclasses import dataclass
from typing import Any

import pytest

if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))

import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from tests.ranks import (
    DEVICE_TYPE,
    LAUNCHED,
    WORLD_SIZES,
    Failure,
    RankError,
    all_world_sizes,
    device,
    multi_world_sizes,
    run_ranks,
)

N = WORLD_SIZES[-1]
LAST = N - 1
pool_only = pytest.mark.skipif(LAUNCHED, reason="launched ranks are not killed and rebuilt")


@dataclass
class Tensors:
    """A result that hides its tensors from a search in lists and dictionaries."""

    values: dict[str, torch.Tensor]


def _rank(*args: int, **kwargs: int) -> tuple[int, int, tuple[int, ...], dict[str, int]]:
    return dist.get_rank(), dist.get_world_size(), args, kwargs


@all_world_sizes
def test_results_come_in_rank_order(world_size: int) -> None:
    expected = [(rank, world_size, (1, 2), {"key": 3}) for rank in range(world_size)]
    assert run_ranks(world_size, _rank, 1, 2, key=3) == expected


def _collectives(value: int) -> tuple[int, int]:
    here = torch.tensor([dist.get_rank() + value], device=device())
    everywhere = torch.tensor([dist.get_rank() + value])  # on the CPU, in any case
    dist.all_reduce(here)
    dist.all_reduce(everywhere)
    return int(here), int(everywhere)


@all_world_sizes
@given(value=st.integers(-(2**40), 2**40))
def test_collectives_work_with_drawn_arguments(world_size: int, value: int) -> None:
    total = sum(range(world_size)) + world_size * value
    assert run_ranks(world_size, _collectives, value) == [(total, total)] * world_size


def _rotate() -> int:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    sent = torch.tensor([rank], device=device())
    received = torch.empty_like(sent)
    operations = [
        dist.P2POp(dist.isend, sent, (rank + 1) % world_size),
        dist.P2POp(dist.irecv, received, (rank - 1) % world_size),
    ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    return int(received)


@multi_world_sizes
def test_point_to_point_works(world_size: int) -> None:
    assert run_ranks(world_size, _rotate) == [(r - 1) % world_size for r in range(world_size)]


def _tensors(given: torch.Tensor) -> Tensors:
    values = torch.arange(6, dtype=torch.bfloat16, device=device()).reshape(2, 3).requires_grad_()
    return Tensors({"given": given.to(device()), "view": (2 * values).t()})


@all_world_sizes
def test_tensors_travel_by_value(world_size: int) -> None:
    given = torch.tensor([1.0, 0.1], dtype=torch.bfloat16)
    view = torch.tensor([[0, 6], [2, 8], [4, 10]], dtype=torch.bfloat16)
    for result in run_ranks(world_size, _tensors, given):
        torch.testing.assert_close(result.values, {"given": given, "view": view}, rtol=0, atol=0)
        assert not result.values["view"].requires_grad


def _process_and_random_number() -> tuple[int, float]:
    return os.getpid(), torch.rand(()).item()


def test_ranks_persist_and_draw_the_same_random_numbers() -> None:
    first = run_ranks(N, _process_and_random_number)
    assert run_ranks(N, _process_and_random_number) == first
    processes, numbers = zip(*first, strict=True)
    assert len(set(processes)) == N
    assert len(set(numbers)) == 1


def _raise_on_last_rank() -> None:
    if dist.get_rank() == LAST:
        raise KeyError("boom")
    dist.barrier()


@pytest.mark.skipif(
    LAUNCHED and DEVICE_TYPE == "cuda",
    reason="NCCL ends a launched rank that waits for a failed one",
)
def test_an_exception_is_reported_and_the_next_task_works() -> None:
    with pytest.raises(RankError) as caught:
        run_ranks(N, _raise_on_last_rank)
    assert "KeyError: 'boom'" in str(caught.value)
    assert "in _raise_on_last_rank" in str(caught.value)
    assert caught.value.failures[LAST].type_name == "KeyError"
    assert [result[0] for result in run_ranks(N, _rank)] == list(range(N))


def _raise_on_odd_ranks() -> int:
    rank = dist.get_rank()
    if rank % 2:
        raise ValueError(f"rank {rank}")
    return rank


def test_exceptions_can_be_returned() -> None:
    results = run_ranks(N, _raise_on_odd_ranks, return_exceptions=True)
    for rank, result in enumerate(results):
        if rank % 2:
            assert isinstance(result, Failure)
            assert (result.type_name, result.message) == ("ValueError", f"rank {rank}")
        else:
            assert result == rank


def test_all_failures_are_reported_lowest_rank_first() -> None:
    with pytest.raises(RankError) as caught:
        run_ranks(N, _raise_everywhere)
    parts = str(caught.value).split("--- rank ")[1:]
    assert [part.splitlines()[0] for part in parts] == [f"{rank} ---" for rank in range(N)]


def _raise_everywhere() -> None:
    pytest.fail("everywhere")


def _unpicklable() -> Any:
    return lambda: None


def _warn() -> None:
    warnings.warn("careful", UserWarning, stacklevel=1)


@pytest.mark.parametrize("function", [_unpicklable, _warn])
def test_bad_results_and_warnings_are_errors(function: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RankError):
            run_ranks(N, function)


def test_warning_filters_of_the_test_hold_on_the_ranks() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "care")
        assert run_ranks(N, _warn) == [None] * N


def _hang_on_rank_0() -> None:
    if dist.get_rank() == 0:
        time.sleep(600)


@pool_only
def test_a_hung_rank_is_killed_and_replaced() -> None:
    before = run_ranks(N, _process_and_random_number)
    with pytest.raises(RankError, match="no answer in 2 s") as caught:
        run_ranks(N, _hang_on_rank_0, timeout=2.0)
    assert list(caught.value.failures) == [0]
    assert "in _hang_on_rank_0" in str(caught.value)
    after = run_ranks(N, _process_and_random_number)
    assert not {process for process, _ in before} & {process for process, _ in after}


def _die_on_last_rank() -> None:
    if dist.get_rank() == LAST:
        os._exit(7)


@pool_only
def test_a_dead_rank_is_reported() -> None:
    with pytest.raises(RankError, match="died with exit code 7"):
        run_ranks(N, _die_on_last_rank)


@pytest.mark.skipif(not LAUNCHED, reason="only launched ranks are of one size")
def test_other_world_sizes_than_the_launched_one_are_skipped() -> None:
    with pytest.raises(pytest.skip.Exception):
        run_ranks(N + 1, _rank)
