"""Run a function on every rank of a process group; every test that communicates uses this.

`run_ranks` keeps one pool of processes per world size, or, under `torchrun`, uses the ranks
that were launched. Tests are written the same way for both:

    @all_world_sizes
    def test_sum(world_size: int) -> None:
        assert run_ranks(world_size, _sum) == [world_size] * world_size

`torch.distributed.launch` runs a test file as a script, which cannot import the package `tests`.
Such a file hands over to pytest before it imports from there:

    import pytest

    if __name__ == "__main__":
        raise SystemExit(pytest.main([__file__]))

    from tests.ranks import run_ranks
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from typing import Any, Literal, TypeVar, overload

import pytest

from tests.ranks.group import DEVICE_TYPE, LAUNCHED, WORLD_SIZES, device, is_possible
from tests.ranks.launch import Launch
from tests.ranks.outcome import Failure, RankError, any_failed
from tests.ranks.pool import Pool
from tests.ranks.task import encode

__all__ = [
    "DEVICE_TYPE",
    "LAUNCHED",
    "THOROUGH",
    "WORLD_SIZES",
    "Failure",
    "RankError",
    "all_world_sizes",
    "device",
    "multi_world_sizes",
    "replace_ranks",
    "run_ranks",
    "shutdown",
]

all_world_sizes = pytest.mark.parametrize("world_size", WORLD_SIZES)
multi_world_sizes = pytest.mark.parametrize("world_size", [n for n in WORLD_SIZES if n > 1])

#: All sizes for all cases take minutes; RTP_TEST_EXAMPLES=10, as for hypothesis, has the patience.
THOROUGH = float(os.environ.get("RTP_TEST_EXAMPLES", "1")) > 1


_T = TypeVar("_T")
_runners: dict[int, Pool | Launch] = {}  # by world size


@overload
def run_ranks(
    world_size: int,
    function: Callable[..., _T],
    *args: Any,
    timeout: float = ...,
    return_exceptions: Literal[False] = ...,
    **kwargs: Any,
) -> list[_T]: ...


@overload
def run_ranks(
    world_size: int,
    function: Callable[..., _T],
    *args: Any,
    timeout: float = ...,
    return_exceptions: Literal[True],
    **kwargs: Any,
) -> list[_T | Failure]: ...


def run_ranks(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: float = 120.0,
    return_exceptions: bool = False,
    **kwargs: Any,
) -> list[Any]:
    """Call `function(*args, **kwargs)` on every rank and return the results in rank order.

    The function lives at module level. Arguments and results travel by value; tensors come back
    detached and on the CPU. Torch's random seed is the same on every rank and for every call.
    If ranks raise, die or don't answer within `timeout` seconds, `RankError` reports them all; with
    `return_exceptions` a `Failure` stands for each of them among the results. The ranks get a
    new process group after that, so expect exceptions inside `function` where you can. The test
    is skipped where `world_size` ranks are not to be had.
    """
    __tracebackhide__ = True
    if not is_possible(world_size):
        pytest.skip(f"needs {world_size} ranks; only {WORLD_SIZES} are possible here")
    if world_size not in _runners:
        _runners[world_size] = Launch() if LAUNCHED else Pool(world_size)
    outcomes = _runners[world_size].run(encode(function, args, kwargs), timeout)
    if any_failed(outcomes) and not return_exceptions:
        raise RankError(outcomes)
    return [o if isinstance(o, Failure) else pickle.loads(o) for o in outcomes]


def replace_ranks(world_size: int) -> None:
    """After ranks have wrapped unlike numbers of models: on GPUs no group of theirs is peers then.

    Launched ranks stay.
    """
    if DEVICE_TYPE == "cuda" and not LAUNCHED and world_size in _runners:
        _runners.pop(world_size).close()


def shutdown() -> None:
    """End the worker processes, or leave the launched process group."""
    while _runners:
        _runners.popitem()[1].close()
