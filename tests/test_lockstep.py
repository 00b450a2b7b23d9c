"""Ranks that are out of step get an error that names what each of them did."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from contextlib import nullcontext
from copy import deepcopy
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))

import torch
import torch.distributed as dist
from torch import nn

from rtp_wrap import (
    Gather,
    OutOfStepError,
    Replicate,
    RotatedTensorParallel,
    ShardingPolicy,
    wrapper,
)
from rtp_wrap.lockstep import HISTORY, Lockstep, _difference
from rtp_wrap.mesh import mesh_of
from rtp_wrap.rings import Rings
from tests.parity import compare_gradients
from tests.ranks import DEVICE_TYPE, all_world_sizes, device, multi_world_sizes, run_ranks

ROTATE = ShardingPolicy(replicate_below=0)


def _group() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


def _lockstep(group: dist.ProcessGroup) -> Lockstep:
    return Lockstep(Rings(mesh_of(group, None)))


def _in_step() -> None:
    lockstep = _lockstep(_group())
    digests = {lockstep.digest}
    for event in ("a", "b", "ab", "b"):
        lockstep.record(event)
        digests.add(lockstep.digest)
        lockstep.verify("a test")
    assert len(digests) == 5, "the digest is one of all events and their order"


@all_world_sizes
def test_ranks_in_step_go_on(world_size: int) -> None:
    run_ranks(world_size, _in_step)


def _message(events: dict[int, list[str]], occasions: dict[int, str]) -> str:
    """What `verify` says if this rank (or -1: any other) had these events."""
    rank = dist.get_rank()
    lockstep = _lockstep(_group())
    for event in events.get(rank, events[-1]):
        lockstep.record(event)
    try:
        lockstep.verify(occasions.get(rank, occasions[-1]))
    except OutOfStepError as error:
        for _ in range(2):  # and it stays so
            with pytest.raises(OutOfStepError):
                lockstep.verify("a later occasion")
        return str(error)
    return ""


SAME = {-1: "a step"}
DIFFERENCES: list[tuple[dict[int, list[str]], dict[int, str], str, str]] = [
    ({-1: ["a", "b", "c"], 1: ["a", "x", "c"]}, SAME, "b", "x"),
    ({-1: ["a", "b"], 1: ["a", "b", "c"]}, SAME, "(a step)", "c"),
    ({-1: ["a", "b"], 1: []}, SAME, "a", "(a step)"),
    ({-1: ["a"]}, {-1: "a step", 1: "wrapping"}, "(a step)", "(wrapping)"),
    ({-1: ["a"] * HISTORY + ["b"], 1: ["a"] * HISTORY + ["c"]}, SAME, "b", "c"),
    ({-1: ["a"] * (HISTORY + 9), 1: ["a"] * HISTORY + ["c"] * 9}, SAME, "a", "c"),
]


@multi_world_sizes
@pytest.mark.parametrize(("events", "occasions", "others", "second"), DIFFERENCES)
def test_the_first_difference_is_named_with_the_ranks(
    world_size: int,
    events: dict[int, list[str]],
    occasions: dict[int, str],
    others: str,
    second: str,
) -> None:
    for message in run_ranks(world_size, _message, events, occasions):
        assert f"rank 0: {others}, rank 1: {second}" in message


def _late() -> None:
    group = dist.new_group(timeout=timedelta(seconds=1))
    lockstep = _lockstep(group)
    lockstep.record("layers.0 forward")
    if dist.get_rank() == 0:
        with pytest.raises(
            OutOfStepError, match=r"rank 0 came to a step after 'layers\.0 forward'.*did not come"
        ):
            lockstep.verify("a step")
    dist.barrier()
    dist.destroy_process_group(group)


@multi_world_sizes
def test_a_rank_that_does_not_come_is_an_error_after_the_groups_timeout(world_size: int) -> None:
    run_ranks(world_size, _late)


def _default_device() -> None:
    lockstep = _lockstep(_group())
    with torch.device("meta"):
        lockstep.verify("a test")


@multi_world_sizes
def test_comparisons_are_on_the_host_whatever_the_default_device_is(world_size: int) -> None:
    run_ranks(world_size, _default_device)


class Branching(nn.Module):
    def __init__(self, right: int = 4) -> None:
        super().__init__()
        self.left = nn.Linear(4, 4, bias=False)
        self.right = nn.Linear(4, right, bias=False)

    def forward(self, x: torch.Tensor, left: bool) -> torch.Tensor:
        return self.left(x) if left else self.right(x)


def _branches(how: str, right: int = 4) -> str:
    policy = {"*": Replicate()} if how == "replicate" else {"*": Gather()}
    # A ring of CPUs waits for it; the first collective of NCCL takes longer where much else runs.
    group = dist.new_group(timeout=timedelta(seconds=2 if DEVICE_TYPE == "cpu" else 20))
    wrapped = RotatedTensorParallel(
        Branching(right).to(device()), group, policy=ROTATE if how == "rotate" else policy
    )
    before = deepcopy([p._local_tensor for p in wrapped.parameters()])  # type: ignore[attr-defined]
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=1.0)
    x = torch.ones(2, 4, device=device())
    message = ""
    try:
        wrapped(x, left=dist.get_rank() != 1).sum().backward()
        optimizer.step()
    except RuntimeError as error:
        message = f"{type(error).__name__}: {error}"
    for parameter, value in zip(wrapped.parameters(), before, strict=True):
        assert torch.equal(parameter._local_tensor, value)  # type: ignore[attr-defined]
    dist.destroy_process_group(group)
    return message


@multi_world_sizes
@pytest.mark.parametrize(("how", "right"), [("replicate", 4), ("replicate", 400), ("gather", 4)])
def test_ranks_of_different_branches_get_an_error_before_the_optimizer_that_names_both_layers(
    world_size: int, how: str, right: int
) -> None:
    for message in run_ranks(world_size, _branches, how, right):
        assert message.startswith("OutOfStepError: ranks are out of step (rank 0: ")
        assert "left.weight" in message.split("rank 1")[0]
        assert "right.weight" in message.split("rank 1")[1].split("rank 2")[0]


class Shifted(nn.Module):
    """Two replicated parameters behind a frozen layer, both in use or neither."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4, bias=False).requires_grad_(False)
        self.shift, self.scale = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor, shifted: bool) -> torch.Tensor:
        y = self.layer(x)
        return y * self.scale + self.shift if shifted else y


def _nothing_to_average(more: int) -> str:
    """The last rank has no gradients in the first of ``more`` + 1 backwards."""
    group = dist.new_group(timeout=timedelta(seconds=60))
    wrapped = RotatedTensorParallel(Shifted().to(device()), group)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=1.0)
    x = torch.ones(2, 4, device=device(), requires_grad=True)
    message = ""
    try:
        for backward in range(more + 1):
            without = backward == 0 and dist.get_rank() == dist.get_world_size() - 1
            wrapped(x, shifted=not without).sum().backward()
        optimizer.step()
    except OutOfStepError as error:
        message = str(error)
    dist.destroy_process_group(group)
    return message


@multi_world_sizes
@pytest.mark.parametrize("more", [0, 1])
def test_a_rank_without_gradients_to_average_is_found_where_it_compares_next(
    world_size: int, more: int
) -> None:
    last = world_size - 1
    for message in run_ranks(world_size, _nothing_to_average, more, timeout=45):
        assert "rank 0: average of 2 gradients, shift and on [0, 1]" in message
        assert f"rank {last}: " in message


@pytest.mark.skipif(DEVICE_TYPE == "cuda", reason="NCCL ends a process that waits too long")
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_of_different_rotations_get_an_error_that_names_both_layers(world_size: int) -> None:
    for message in run_ranks(world_size, _branches, "rotate"):
        assert message.startswith("OutOfStepError: ")
        assert "(rank 0: left forward, rank 1: right forward" in message


def _branches_without_gradients(how: str) -> str:
    """Of equal shapes, so that nothing but the comparison can tell."""
    policy = ShardingPolicy(
        rules={"*": Gather()} if how == "gather" else {}, replicate_below=0, transport="peer"
    )
    wrapped: Any = RotatedTensorParallel(Branching().to(device()), policy=policy)
    x = torch.ones(2, 4, device=device())
    with torch.inference_mode():
        wrapped(x, left=True)
        with pytest.raises(OutOfStepError) as told:
            wrapped(x, left=dist.get_rank() != 1)
    return str(told.value)


@multi_world_sizes
@pytest.mark.parametrize("how", ["pull", "gather"])
def test_ranks_of_different_branches_in_evaluation_get_an_error_that_names_both_layers(
    world_size: int, how: str
) -> None:
    for message in run_ranks(world_size, _branches_without_gradients, how):
        first, second, *_ = message.split("rank 1")
        assert "left" in first
        assert "right" in second
        assert "what this forward returned is wrong" in second


def _alone(policy: dict[str, Any]) -> None:
    """A model without communication may be evaluated by one rank."""
    wrapped: Any = RotatedTensorParallel(Branching().to(device()), policy=policy)
    if dist.get_rank() == 0:
        with torch.no_grad():
            wrapped(torch.ones(2, 4, device=device()), left=True)
    dist.barrier()


@multi_world_sizes
def test_one_rank_alone_may_evaluate_what_is_replicated(world_size: int) -> None:
    run_ranks(world_size, _alone, {"*": Replicate()})


def _skipped_step() -> None:
    """A rank that does not step is noticed when the others have waited for it."""
    # NCCL, which ends a process that waits for longer, takes its time to begin with.
    group = dist.new_group(timeout=timedelta(seconds=1 if DEVICE_TYPE == "cpu" else 10))
    wrapped: Any = RotatedTensorParallel(
        nn.Linear(4, 4, bias=False).to(device()), group, policy=ROTATE
    )
    wrapped(torch.ones(2, 4, device=device())).sum().backward()
    if dist.get_rank() == 0:
        with pytest.raises(OutOfStepError, match="rank 0 came to an optimizer step"):
            torch.optim.SGD(wrapped.parameters(), lr=1.0).step()
    dist.barrier()
    dist.destroy_process_group(group)


@multi_world_sizes
def test_an_optimizer_step_that_one_rank_skips_is_an_error_on_the_others(world_size: int) -> None:
    run_ranks(world_size, _skipped_step)


def _fail(*_: Any, **__: Any) -> None:
    raise ZeroDivisionError("a mistake")


def _initialise(module: nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        nn.init.ones_(parameter)


def _initialise_but_the_second(module: nn.Module) -> None:
    if module.out_features == 3:  # type: ignore[comparison-overlap]
        _fail()
    _initialise(module)


def _small(where: torch.device | str) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8, device=where), nn.Linear(8, 3, device=where))


def _wrap_wrongly(mistake: str) -> None:
    """On every rank, but only the last one makes the mistake."""
    mistaken = dist.get_rank() == dist.get_world_size() - 1
    model = _small("meta" if mistake == "initialisation" else device())
    before = {fqn: (p, type(p)) for fqn, p in model.named_parameters()}
    argument: Any = model
    options: dict[str, Any] = {"policy": ROTATE}
    if mistake == "module":
        argument = "model" if mistaken else model
    elif mistake == "policy" and mistaken:
        options["policy"] = {"nowhere": Replicate()}
    elif mistake == "initialisation":
        options["param_init_fn"] = _initialise_but_the_second if mistaken else _initialise
    broken = {"planning": "plan_of", "adoption": "adopt"}.get(mistake) if mistaken else None
    patched = patch.object(wrapper, broken, _fail) if broken else nullcontext()
    own, text = {
        "module": (TypeError, "wraps an nn.Module, not str"),
        "policy": (ValueError, "'nowhere' chose no parameter"),
        "initialisation": (RuntimeError, "ZeroDivisionError: a mistake"),
    }.get(mistake, (ZeroDivisionError, "a mistake"))
    last = dist.get_world_size() - 1
    quoted = rf"rank {last}: \(.*: {own.__name__}: .*{text}"
    with patched, pytest.raises(own if mistaken else OutOfStepError) as caught:
        RotatedTensorParallel(argument, **options)
    assert re.search(text if mistaken else quoted, str(caught.value))
    if mistake not in ("initialisation", "adoption"):  # those come behind the first changes
        assert {fqn: (p, type(p)) for fqn, p in model.named_parameters()} == before
    # And the group is as good as before.
    torch.manual_seed(0)
    dense = _small(device())
    wrapped = RotatedTensorParallel(deepcopy(dense), policy=ROTATE)
    x = torch.ones(2, 4, device=device())
    for net in (dense, wrapped):
        net(x).square().sum().backward()
    compare_gradients(dense, wrapped, {"rtol": 1e-5, "atol": 1e-5})


@multi_world_sizes
@pytest.mark.parametrize("mistake", ["module", "policy", "planning", "initialisation", "adoption"])
def test_a_mistake_of_one_rank_in_wrapping_is_an_error_of_all_at_once(
    world_size: int, mistake: str
) -> None:
    run_ranks(world_size, _wrap_wrongly, mistake, timeout=30)  # the group's own is 60


#: Many short lives of two ranks, each of which ends right behind a meeting, while Gloo's threads
#: cannot have the interpreter. Forked, since an import takes longer than all the rest; frozen, or
#: the end of each would look for garbage in all that was imported.
ENDINGS = """
import gc, os, sys, time
import torch
import torch.distributed as dist
from torch import nn
from rtp_wrap import RotatedTensorParallel, ShardingPolicy
from rtp_wrap.lockstep import Lockstep
from rtp_wrap.mesh import mesh_of
from rtp_wrap.rings import Rings

gc.freeze()
torch.set_num_threads(1)
for attempt in range(5):
    ranks = [0, 0]
    for rank in range(2):
        ranks[rank] = os.fork()
        if not ranks[rank]:
            file = f"file://{sys.argv[1]}/{attempt}"
            dist.init_process_group("gloo", init_method=file, rank=rank, world_size=2)
            lockstep = Lockstep(Rings(mesh_of(None, None)))
            policy = ShardingPolicy(replicate_below=0, transport="peer")
            layers = [nn.Linear(8, 8, bias=False) for _ in range(2)]
            model = RotatedTensorParallel(nn.Sequential(*layers), policy=policy)
            for _ in range(2):
                model(torch.ones(2, 8)).sum().backward()
            time.sleep(0.2)  # of what came before nothing is left
            sys.setswitchinterval(1000)
            if sys.argv[2] == "compare":
                lockstep.verify("its end")
            else:
                model(torch.ones(2, 8)).sum().backward()
            sys.exit()
    if statuses := [status for rank in ranks if (status := os.waitpid(rank, 0)[1])]:
        sys.exit(f"attempt {attempt}: {statuses}")
"""


@pytest.mark.skipif("RANK" in os.environ, reason="starts ranks of its own")
@pytest.mark.parametrize("meeting", ["compare", "meet"])
def test_a_program_may_end_behind_a_meeting(tmp_path: Path, meeting: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ENDINGS, str(tmp_path), meeting],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_of_many_ranks_those_that_did_the_same_are_told_together() -> None:
    accounts: list[Any] = [("a step", 2, ["a", "b"]) for _ in range(16)]
    accounts[3] = ("a step", 2, ["a", "c"])
    assert _difference(accounts) == "rank 0 and 14 others: b, rank 3: c"
    assert _difference(accounts[2:4]) == "rank 0: b, rank 1: c"
