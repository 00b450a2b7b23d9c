"""The peer transport: by shared memory on CPUs, by copy engines on GPUs; results as by hops.

What it has in common with the ring is tested with every rotated layer, by whichever transport
RTP_WRAP_TRANSPORT and the device make of ``"auto"``. Here both are forced.
"""

from __future__ import annotations

import gc
import os
import re
import weakref
from copy import deepcopy
from datetime import timedelta
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import rtp_wrap
from rtp_wrap import MixedPrecisionPolicy, Rotate, RotatedTensorParallel, ShardingPolicy
from rtp_wrap.transport import choice
from rtp_wrap.transport.area import WINDOW, Area
from rtp_wrap.transport.cells import aligned
from rtp_wrap.transport.choice import VARIABLE
from rtp_wrap.transport.foresight import Visit
from rtp_wrap.transport.peer import PeerTransport
from rtp_wrap.transport.shared import _DIRECTORY
from tests.parity import FP64, mean_square
from tests.ranks import (
    DEVICE_TYPE,
    all_world_sizes,
    device,
    multi_world_sizes,
    run_ranks,
)

SMALL = 7 * 4 * 64  # seven slots in which four tiles of 8 numbers in fp64 fit


def _policy(transport: str = "peer", staging_bytes: int | None = None) -> ShardingPolicy:
    return ShardingPolicy(replicate_below=0, transport=transport, staging_bytes=staging_bytes)


class Model(nn.Module):
    """Layers cut along rows, one that is used twice, a checkpointed one, a tied table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(13, 10)
        self.first = nn.Linear(10, 24)
        self.twice = nn.Linear(24, 24)
        self.again = nn.Linear(24, 10, bias=False)
        self.head = nn.Linear(10, 13, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.first(self.table(ids)).tanh()
        x = self.twice(self.twice(x).tanh()).tanh()
        x = checkpoint(lambda x: self.again(x).tanh(), x, use_reentrant=False)
        return self.head(x)


def _pair(**wrap: Any) -> tuple[nn.Module, RotatedTensorParallel]:
    torch.manual_seed(0)
    dense = Model().to(device(), torch.float64)
    return dense, RotatedTensorParallel(deepcopy(dense), **wrap)


def _ids(step: int, rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randint(13, (4, 5), generator=generator).to(device())


def _compare(dense: nn.Module, wrapped: RotatedTensorParallel, steps: int = 3) -> None:
    """Both train, the dense one on all ranks' batches; the last loss stays alive."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    optimizers = [
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in (dense, wrapped)
    ]
    for step in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        for each in range(ranks):
            (mean_square(dense(_ids(step, each))) / ranks).backward()
        loss = mean_square(wrapped(_ids(step, rank)))
        loss.backward()
        for name, parameter in wrapped.named_parameters():
            assert parameter.grad is not None
            expected = dense.get_parameter(name).grad
            torch.testing.assert_close(parameter.grad.full_tensor(), expected, **FP64)
        for optimizer in optimizers:
            optimizer.step()
    with torch.no_grad():
        torch.testing.assert_close(wrapped(_ids(9, rank)), dense(_ids(9, rank)), **FP64)


def _train(inplace: bool, staging_bytes: int | None) -> str:
    dense, wrapped = _pair(policy=_policy(staging_bytes=staging_bytes), inplace=inplace)
    _compare(dense, wrapped)
    return wrapped.transport


@all_world_sizes
@pytest.mark.parametrize("inplace", [False, True])
def test_training_is_that_of_the_dense_model(world_size: int, inplace: bool) -> None:
    """With whole layers in a slot, and cut into many cells."""
    expected = ["peer" if world_size > 1 else "ring"] * world_size
    assert run_ranks(world_size, _train, inplace, None) == expected
    assert run_ranks(world_size, _train, inplace, SMALL) == expected


class Ordered(nn.Module):
    """Equal layers, called in an order that can change; ``written`` is doubled before its call."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(12, 12, bias=bias) for _ in range(4)])
        self.order = [0, 1, 2, 3]
        self.written: int | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index in self.order:
            if index == self.written:
                with torch.no_grad():
                    weight: Any = self.layers[index]._parameters["weight"]
                    weight.mul_(2)
            x = self.layers[index](x).tanh()
        return x


def _ordered(
    group: dist.ProcessGroup | None = None, *, bias: bool = True
) -> tuple[Any, Any, torch.Tensor]:
    torch.manual_seed(0)
    dense = Ordered(bias).to(device(), torch.float64)
    generator = torch.Generator().manual_seed(dist.get_rank())
    x = torch.randn(3, 12, dtype=torch.float64, generator=generator).to(device())
    return dense, RotatedTensorParallel(deepcopy(dense), group, policy=_policy()), x


def _order_changes() -> None:
    """What is expected to come next does not come: another layer, or another pass."""
    dense, wrapped, x = _ordered()
    for order in ([0, 1, 2, 3], [0, 1, 2, 3], [0, 2, 1, 3], [3], [0, 1, 1, 2], [0, 1, 2, 3]):
        dense.order = wrapped.order = order
        y = wrapped(x)
        torch.testing.assert_close(y, dense(x), **FP64)
        if len(order) > 1:  # after [3] there is no backward
            y.sum().backward()
            wrapped.zero_grad()


@multi_world_sizes
def test_the_order_may_change(world_size: int) -> None:
    run_ranks(world_size, _order_changes)


def _written_in_between() -> None:
    """A layer that the one before it has fetched already is written, and then called."""
    dense, wrapped, x = _ordered()
    with torch.no_grad():
        for written in (None, None, 1, 3, 1):
            dense.written = wrapped.written = written
            torch.testing.assert_close(wrapped(x), dense(x), **FP64)


@multi_world_sizes
def test_a_layer_sees_its_weight_as_it_is(world_size: int) -> None:
    run_ranks(world_size, _written_in_between)


def _written_by_one() -> str:
    group = dist.new_group(timeout=timedelta(seconds=20))
    # Without biases, which one rank would wait for in NCCL, where destroying the group hangs then.
    _, wrapped, x = _ordered(group, bias=False)
    with torch.no_grad():
        for _ in range(2):
            wrapped(x)
        wrapped.written = 2 if dist.get_rank() == 0 else None
        with pytest.raises(RuntimeError) as told:
            wrapped(x)
    dist.destroy_process_group(group)
    return str(told.value)


@multi_world_sizes
def test_a_layer_that_one_rank_writes_when_it_was_fetched_is_an_error(world_size: int) -> None:
    """No other rank would fetch it again, so that all that came later would be of other layers."""
    first, *_ = run_ranks(world_size, _written_by_one)
    assert "layers.2 forward, whose weight was written since it was fetched ahead" in first


def _written_unseen() -> None:
    """No version tells of a write to ``.data``; tiles fetched ahead must not be of before it."""
    dense, wrapped, x = _ordered()
    with torch.no_grad():
        # The third forward ends where layer 1 came again in the second, and the fourth begins so.
        for order in ([0, 1, 1], [0, 1, 1], [0, 1], [1], [0, 1]):
            dense.order = wrapped.order = order
            for model in (dense, wrapped):
                for parameter in model.parameters():
                    getattr(parameter, "_local_tensor", parameter).data.mul_(1.5)
            torch.testing.assert_close(wrapped(x), dense(x), **FP64)


@multi_world_sizes
def test_a_forward_sees_weights_as_they_are(world_size: int) -> None:
    run_ranks(world_size, _written_unseen)


def _nothing_in_vain() -> list[int]:
    """How often ranks meet in each of some forwards without backward."""
    _, wrapped, x = _ordered()
    peers = wrapped._ring.peers
    met = []
    with torch.no_grad():
        for _ in range(4):
            before = peers.barriers
            wrapped(x)
            met.append(peers.barriers - before)
    return met


@multi_world_sizes
def test_nothing_is_fetched_beyond_a_forward(world_size: int) -> None:
    assert run_ranks(world_size, _nothing_in_vain) == [[4, 4, 4, 4]] * world_size


def _copies_in_turn() -> list[int]:
    """How often ranks meet in each of some steps with a frozen copy as the reference."""
    _, wrapped, x = _ordered()
    reference, peers = deepcopy(wrapped), wrapped._ring.peers
    met = []
    for _ in range(4):
        before = peers.barriers
        with torch.no_grad():
            reference(x)
        wrapped(x).sum().backward()
        met.append(peers.barriers - before)
    return met


@multi_world_sizes
def test_nothing_is_fetched_in_vain_for_copies_in_turn(world_size: int) -> None:
    """Once for each of four layers in each forward; dx of three, and the gradients of four."""
    assert run_ranks(world_size, _copies_in_turn) == [[4 + 4 + 3 + 4] * 4] * world_size


def _copies_come_and_go() -> int:
    """How many weights of a copy are there after it was deleted."""
    _, wrapped, x = _ordered()
    wrapped(x).sum().backward()
    copy = deepcopy(wrapped)
    for _ in range(2):
        wrapped(x).sum().backward()
        with torch.no_grad():
            copy(x)
    weights = [weakref.ref(each) for each in copy.parameters()]
    del copy
    gc.collect()
    return sum(each() is not None for each in weights)


@multi_world_sizes
def test_a_deleted_copys_weights_are_gone(world_size: int) -> None:
    """Copies share the ring, and what it knows of which weight comes next."""
    assert run_ranks(world_size, _copies_come_and_go) == [0] * world_size


def _visits_after_copies() -> list[int]:
    """How many visits are known after each of some copies was used and deleted."""
    _, wrapped, x = _ordered()
    known = []
    for _ in range(4):
        wrapped(x).sum().backward()
        copy = deepcopy(wrapped)
        with torch.no_grad():
            copy(x)
        del copy
        gc.collect()
        known.append(sum(type(each) is Visit for each in gc.get_objects()))
    return known


@multi_world_sizes
def test_what_is_known_does_not_grow_with_copies(world_size: int) -> None:
    for known in run_ranks(world_size, _visits_after_copies):
        assert known[1:] == known[1:2] * 3


def _facts(rank: int, **changes: Any) -> Any:
    others = frozenset(f"gpu {other}" for other in range(3) if other != rank)
    facts = {"host": "here", "device": f"gpu {rank}", "reads": others, "lacks": "", "meetings": 2}
    return choice._Facts(**{**facts, **changes})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, ""),
        ({"host": "there"}, "the ranks are on several hosts"),
        ({"lacks": "an old driver"}, "rank 1: an old driver"),
        ({"device": "gpu 0"}, "rank 0 shares its GPU with another rank"),
        ({"reads": frozenset(["gpu 0"])}, "the GPU of rank 1 cannot read those of all others"),
        ({"meetings": 3}, r"ranks have wrapped models \[2, 3, 2\] times .* in groups that not all"),
    ],
)
def test_what_keeps_gpus_from_being_peers(changes: dict[str, Any], told: str) -> None:
    facts = [_facts(0), _facts(1, **changes), _facts(2)]
    obstacle = choice._obstacle(facts, 0, on_gpus=True)
    assert re.match(told or "$", obstacle)


class Unequal(nn.Module):
    """A layer that fills a slot, and three of which two do."""

    def __init__(self) -> None:
        super().__init__()
        self.large = nn.Linear(8, 16, bias=False)
        self.small = nn.ModuleList(nn.Linear(*size, bias=False) for size in ((16, 4), (4, 16)))
        self.last = nn.Linear(16, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.large(x).tanh()
        for layer in self.small:
            x = layer(x).tanh()
        return self.last(x)


def _fetched_together(staging_bytes: int) -> tuple[list[int], list[int]]:
    """How often ranks meet in each of some steps, and how often of that for gradients."""
    torch.manual_seed(0)
    dense = Unequal().to(device(), torch.float64)
    wrapped = RotatedTensorParallel(deepcopy(dense), policy=_policy(staging_bytes=staging_bytes))
    peers: Any = wrapped._ring.peers
    met, parts = [], []
    for step in range(3):
        before, of_gradients = peers.barriers, peers._gradients.number
        x = torch.randn(3, 8, dtype=torch.float64).to(device())  # the same on all ranks
        for model in (dense, wrapped):
            model.zero_grad()
            mean_square(model(x)).backward()
        for name, parameter in wrapped.named_parameters():
            gradient: Any = parameter.grad
            torch.testing.assert_close(
                gradient.full_tensor(), dense.get_parameter(name).grad, **FP64, msg=f"{step} {name}"
            )
        met.append(peers.barriers - before)
        parts.append(peers._gradients.number - of_gradients)
    return met, parts


@multi_world_sizes
def test_small_layers_are_fetched_together(world_size: int) -> None:
    """Once it is known what comes, two small layers at a time, also across the end of a forward.

    The second step begins as none before it did. With three ranks no two fit, as the last rows are
    fewer but have as much room.
    """
    rows = 18 if world_size == 3 else 16
    met, parts = run_ranks(world_size, _fetched_together, 7 * rows * 8 * 8)[0]
    assert parts == [4, 4, 4]
    assert met == ([11, 11, 11] if world_size == 3 else [11, 9, 8])


def _raise_in(method: str, at: int) -> None:
    dense, wrapped = _pair(policy=_policy())
    original, calls = getattr(PeerTransport, method), 0

    def raising(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            raise MemoryError("as if it were out of memory")
        return original(*args)

    _compare(dense, wrapped, steps=1)
    with patch.object(PeerTransport, method, raising), pytest.raises(MemoryError):
        mean_square(wrapped(_ids(0, dist.get_rank()))).backward()
    for model in (dense, wrapped):
        model.zero_grad()
    _compare(dense, wrapped)


@multi_world_sizes
def test_after_an_exception_on_all_ranks_training_goes_on(world_size: int) -> None:
    for method, at in (("pull", 1), ("pull", 3), ("pull", 8), ("parts", 2), ("average", 2)):
        run_ranks(world_size, _raise_in, method, at)


def _mixed_precision() -> tuple[float, float]:
    """How far gradients are from those in fp32, by peers and by hops."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 24)).to(device())
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    ranks, rank = dist.get_world_size(), dist.get_rank()
    batches = [
        torch.randn(16, 32, generator=torch.Generator().manual_seed(each)).to(device())
        for each in range(ranks)
    ]
    for batch in batches:
        (mean_square(dense(batch)) / ranks).backward()
    distances = []
    for transport in ("peer", "ring"):
        model = deepcopy(dense)
        model.zero_grad()
        wrapped = RotatedTensorParallel(model, policy=_policy(transport), mixed_precision=precision)
        mean_square(wrapped(batches[rank]).float()).backward()
        grad: Any = wrapped.get_parameter("2.weight").grad
        assert grad.dtype == torch.float32
        expected: Any = dense.get_parameter("2.weight").grad
        distances.append(float((grad.full_tensor() - expected).norm() / expected.norm()))
    return distances[0], distances[1]


@multi_world_sizes
def test_mixed_precision_is_as_precise_as_by_hops(world_size: int) -> None:
    """Parts of gradients travel in bf16, as FSDP2 has them before it reduces in fp32.

    bf16 has 8 bits: one rounding is 2^-9 at most, 0.002; products of rounded factors come to some
    three times that by either transport.
    """
    for by_peers, by_hops in run_ranks(world_size, _mixed_precision):
        assert by_peers < 0.02
        assert by_peers < 2 * by_hops


def _sums(reduce_dtype: torch.dtype) -> tuple[float, float]:
    """Parts that are exact in bf16 and their mean, which has more bits than that."""
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=reduce_dtype)
    wrapped = RotatedTensorParallel(
        nn.Linear(1, 4, bias=False).to(device()), policy=_policy(), mixed_precision=precision
    )
    ranks, rank = dist.get_world_size(), dist.get_rank()
    parts = [256.0, 1.0, 2.0, 4.0][:ranks]
    wrapped(torch.tensor([[parts[rank]]], device=device())).sum().backward()
    grad: Any = wrapped.get_parameter("weight").grad
    return float(grad.full_tensor()[0, 0]), sum(parts) / ranks


@multi_world_sizes
def test_parts_are_summed_in_the_dtype_of_the_policy(world_size: int) -> None:
    for mean, exact in run_ranks(world_size, _sums, torch.float32):
        assert mean == pytest.approx(exact, rel=1e-6)  # fp32
    for mean, exact in run_ranks(world_size, _sums, torch.bfloat16):
        assert mean != pytest.approx(exact, rel=1e-6)
        assert mean == pytest.approx(exact, rel=2**-8)  # one rounding


class _Counted:
    """How many bytes this rank pulls."""

    def __init__(self, memory: Any) -> None:
        self.nbytes = 0
        prepared, copy = memory.prepared, memory.copy
        sizes: dict[int, tuple[Any, int]] = {}

        def counting(copies: Any) -> Any:
            made = prepared(copies)
            sizes[id(made)] = made, sum(to.nbytes for to, _ in copies)
            return made

        def copying(copies: Any, stream: Any) -> None:
            self.nbytes += sizes[id(copies)][1]
            copy(copies, stream)

        memory.prepared, memory.copy = counting, copying


def _pulled() -> tuple[int, int]:
    """Bytes that this rank pulls in a step, and that the plan says it sends."""
    layers = nn.Sequential(nn.Linear(9, 13), nn.Tanh(), nn.Linear(13, 5)).double().to(device())
    options: dict[str, Any] = {"policy": _policy(staging_bytes=SMALL), "inplace": True}
    x = torch.ones(2, 9, dtype=torch.float64, device=device(), requires_grad=True)
    planned = rtp_wrap.plan(layers, world_size=dist.get_world_size(), **options)
    wrapped = RotatedTensorParallel(layers, **options)
    assert planned.staging_bytes == wrapped.staging_bytes <= SMALL
    assert planned.transport == wrapped.transport == "peer"
    assert wrapped._ring.peers is not None
    counted = _Counted(wrapped._ring.peers._memory)
    mean_square(wrapped(x)).backward()
    weights = [each for each in planned.parameters if isinstance(each.home, Rotate)]
    return counted.nbytes, sum(planned.traffic(each, dist.get_rank()).nbytes for each in weights)


@multi_world_sizes
def test_what_ranks_pull_is_what_the_plan_says_they_send(world_size: int) -> None:
    pulled, sent = zip(*run_ranks(world_size, _pulled), strict=True)
    assert sum(pulled) == sum(sent) > 0


@given(
    slot=st.integers(1, 300),
    slots=st.sampled_from([1, 3]),
    sizes=st.lists(st.integers(0, 300), max_size=60),
)
@example(slot=300, slots=3, sizes=[1] * 60)  # the cell before is longer ago than there are events
def test_a_cell_takes_nobodys_place_too_soon(slot: int, slots: int, sizes: list[int]) -> None:
    """With three slots, neither that of the cell before, nor of the one before that."""
    area = Area(1000, slot, slots)
    places: list[tuple[int, int]] = []
    last, used = [-1], 0  # of each filling of a slot
    for number, size in enumerate(min(size, slot) for size in sizes):
        at, before = area.take(size, number)
        assert at >= 1000
        assert at + size <= 1000 + slot * slots
        overlapped = [
            other for other, (start, end) in enumerate(places) if start < at + size and at < end
        ]
        assert before >= max([number - WINDOW, *overlapped])
        assert before < number
        if used + size > slot:
            last, used = [*last, -1], 0
        if len(last) > slots:  # and not later than it must: whoever waits for it is not late then
            assert before == max(last[-1 - slots], number - WINDOW)
        last[-1], used = number, used + aligned(size)
        if slots == 3:
            assert before < number - 1
        places.append((at, at + size))


def _refused() -> str:
    with patch("rtp_wrap.transport.choice._boot", lambda: f"host {dist.get_rank()}"):
        with pytest.raises(ValueError, match="'peer' cannot be used: the ranks are on several"):
            RotatedTensorParallel(nn.Linear(4, 4), policy=_policy())
        with patch.dict(os.environ, {VARIABLE: "peer"}):  # a preference gives way
            return RotatedTensorParallel(nn.Linear(4, 4), policy=_policy("auto")).transport


@multi_world_sizes
def test_ranks_on_several_hosts_use_the_ring(world_size: int) -> None:
    assert run_ranks(world_size, _refused) == ["ring"] * world_size


def _different() -> None:
    transport = "ring" if dist.get_rank() else "peer"
    with pytest.raises(RuntimeError, match=r"out of step.*transport=peer.*transport=ring"):
        RotatedTensorParallel(nn.Linear(4, 4), policy=_policy(transport))


@multi_world_sizes
def test_different_transports_are_an_error_on_every_rank(world_size: int) -> None:
    run_ranks(world_size, _different)


def _cannot_allocate() -> None:
    def refuse(*args: Any) -> None:
        raise OSError("no room")

    kind = "SymmetricMemory" if DEVICE_TYPE == "cuda" else "SharedMemory"
    before = set(_DIRECTORY.glob(f"rtp-{os.getpid()}-*"))
    if dist.get_rank() == 0:
        with patch(f"rtp_wrap.transport.choice.{kind}.__init__", refuse):
            _expect_no_room()
    else:
        _expect_no_room()
    gc.collect()
    dist.barrier()
    assert set(_DIRECTORY.glob(f"rtp-{os.getpid()}-*")) <= before


def _expect_no_room() -> None:
    with pytest.raises(RuntimeError, match=r"could not allocate .*rank 0: OSError: no room"):
        RotatedTensorParallel(nn.Linear(4, 4), policy=_policy())


@multi_world_sizes
def test_memory_that_one_rank_does_not_get_is_an_error_on_every_rank(world_size: int) -> None:
    run_ranks(world_size, _cannot_allocate)


def test_unknown_transports_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="transport='pear': give one of 'auto', 'peer', 'ring'"):
        ShardingPolicy(transport="pear")
    monkeypatch.setenv(VARIABLE, "pear")
    with pytest.raises(ValueError, match="RTP_WRAP_TRANSPORT='pear'"):
        rtp_wrap.plan(nn.Linear(4, 4), world_size=2)


def _two_models() -> None:
    """Two groups in one process, and models that come and go."""
    everyone = dist.new_group(list(range(dist.get_world_size())))
    for group in (None, everyone, None, everyone):
        dense, wrapped = _pair(group=group, policy=_policy())
        fresh, beside = _pair(group=everyone, policy=_policy())
        _compare(dense, wrapped, steps=1)
        _compare(fresh, beside, steps=0)
        del wrapped, beside


@multi_world_sizes
def test_models_may_come_and_go(world_size: int) -> None:
    run_ranks(world_size, _two_models)
