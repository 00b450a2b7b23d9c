"""Rows of a table that ranks read out of the memory of their owners (the peer transport).

What an embedding does with any transport is tested in `test_embedding`. Here the transport is
forced, and ranks have few ids or many: the first read rows, the others copy the table, and all of
them in the same step.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from rtp_wrap import MixedPrecisionPolicy, RotatedTensorParallel, ShardingPolicy
from rtp_wrap.ops import lookup
from rtp_wrap.ops.lookup import Lookup
from rtp_wrap.shard import TileGrid
from rtp_wrap.transport.cells import Published
from rtp_wrap.transport.peer import PeerTransport
from tests.kernels import kernel, needs_triton
from tests.parity import FP64, full, mean_square, sgd
from tests.ranks import DEVICE_TYPE, device, multi_world_sizes, run_ranks

#: Seven slots of 160 bytes: 20 numbers in fp64.
TINY = 7 * 160


def _policy(staging_bytes: int | None = TINY) -> ShardingPolicy:
    return ShardingPolicy(replicate_below=0, transport="peer", staging_bytes=staging_bytes)


def _ids(count: int, rows: int, seed: int = 0) -> torch.Tensor:
    """Different ones on every rank, some of them several times, the first and the last row too."""
    generator = torch.Generator().manual_seed(100 * seed + dist.get_rank())
    ids = torch.randint(rows, (count,), generator=generator)
    ids[: count // 4] = ids[count // 2 : count // 2 + count // 4].clone()
    if count > 1:
        ids[0], ids[-1] = 0, rows - 1
    return ids.to(device())


@contextmanager
def _ways() -> Iterator[list[str]]:
    """How this rank came to the rows of each cell."""
    taken: list[str] = []
    read, pulled = Lookup.read, Published.pulled

    def reading(self: Lookup, published: Published) -> None:
        taken.append("by rows")
        read(self, published)

    def pulling(self: Published) -> Any:
        taken[-1] = "by tiles"
        return pulled(self)

    with patch.object(Lookup, "read", reading), patch.object(Published, "pulled", pulling):
        yield taken


def _check(
    rows: int,
    cols: int,
    counts: list[int],
    *,
    inplace: bool = False,
    staging_bytes: int | None = TINY,
    **options: Any,
) -> set[str]:
    """Rank r looks up ``counts[r]`` ids, the next rank in the next step.

    Outputs are the rows of the table bit for bit, gradients the mean of all ranks'.
    """
    ranks, rank = dist.get_world_size(), dist.get_rank()
    torch.manual_seed(0)
    layer = nn.Embedding(rows, cols, dtype=torch.float64, device=device(), **options)
    nn.init.normal_(layer.weight)
    wrapped = RotatedTensorParallel(
        nn.Sequential(deepcopy(layer)), inplace=inplace, policy=_policy(staging_bytes)
    )
    assert wrapped.transport == "peer"
    optimizer = sgd(wrapped.parameters())
    with _ways() as taken:
        for step in range(2):
            mine = counts[(rank + step) % ranks]
            dense = deepcopy(layer)
            dense.weight.data.copy_(full(wrapped[0].weight.detach()))
            ids = _ids(mine, rows, step)
            y, expected = wrapped(ids), dense(ids)
            assert torch.equal(y, expected)
            optimizer.zero_grad()
            (y.sin().sum() + 0 * y.sum()).backward()
            if mine:  # on CUDA, torch launches a kernel on nothing
                expected.sin().sum().backward()
            gradient = torch.zeros_like(dense.weight) if not mine else dense.weight.grad
            assert gradient is not None
            dist.all_reduce(gradient)
            torch.testing.assert_close(full(wrapped[0].weight.grad), gradient / ranks, **FP64)
            optimizer.step()
    return set(taken)


#: Whole, cut into several cells by rows, also by columns; fewer rows than ranks; uneven.
SIZES = [(30, 6), (1, 1), (2, 5), (21, 3), (5, 40)]


def _check_sizes(inplace: bool) -> None:
    ranks = dist.get_world_size()
    for rows, cols in SIZES:
        counts = [0, rows, 1, 2 * rows][:ranks]
        _check(rows, cols, counts, padding_idx=rows - 1, inplace=inplace)
    _check(40, 6, [9, 5, 0, 60][:ranks], staging_bytes=None, inplace=inplace)
    _check(40, 6, [0] * ranks)


@multi_world_sizes
@pytest.mark.parametrize("inplace", [False, True], ids=["overlap", "inplace"])
def test_rows_are_those_of_the_table(world_size: int, inplace: bool) -> None:
    run_ranks(world_size, _check_sizes, inplace)


@multi_world_sizes
def test_the_sizes_include_tables_cut_by_rows_and_by_columns(world_size: int) -> None:
    cuts = set()
    for shape in SIZES:
        grid = TileGrid(shape, 0, world_size, 20)
        rows, cols = grid.shard(0).shape
        cuts.add((grid.cell[0] < rows, grid.cell[1] < cols))
    assert {(False, False), (True, False), (True, True)} <= cuts


def _ways_taken() -> list[set[str]]:
    """With few ids everywhere, with many, and with few on the last rank alone."""
    last = dist.get_rank() == dist.get_world_size() - 1
    taken = []
    for count in (5, 40, 5 if last else 40):
        wrapped = RotatedTensorParallel(nn.Embedding(40, 6, device=device()), policy=_policy())
        with _ways() as ways:
            wrapped(_ids(count, 40))
        taken.append(set(ways))
    return taken


@multi_world_sizes
def test_every_rank_takes_the_shorter_way_whatever_others_do(world_size: int) -> None:
    by_rows, by_tiles = {"by rows"}, {"by tiles"}
    *others, last = run_ranks(world_size, _ways_taken)
    assert others == [[by_rows, by_tiles, by_tiles]] * (world_size - 1)
    assert last == [by_rows, by_tiles, by_rows]


def test_without_triton_a_gpu_has_no_way_by_rows() -> None:
    with patch.dict(sys.modules, {"rtp_wrap.ops.row_kernel": None}):
        assert lookup._copier.__wrapped__("cuda") is None


def _without_a_kernel() -> list[str]:
    wrapped = RotatedTensorParallel(nn.Embedding(40, 6, device=device()), policy=_policy())
    ids = _ids(5, 40)
    expected = full(wrapped.module.weight.detach())[ids]
    with _ways() as taken, patch.object(lookup, "_copier", lambda kind: None):
        assert torch.equal(wrapped(ids), expected)
    return taken


@multi_world_sizes
def test_where_rows_cannot_be_read_tiles_are_copied(world_size: int) -> None:
    for taken in run_ranks(world_size, _without_a_kernel):
        assert set(taken) == {"by tiles"}


class _Reads(TorchDispatchMode):
    """How many bytes come out of operations on the memories of other ranks."""

    def __init__(self, memory: Any) -> None:
        super().__init__()
        self.nbytes = 0
        others = [each for each in range(memory.world_size) if each != memory.rank]
        self._theirs = {memory.of(each).untyped_storage().data_ptr() for each in others}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        listed = args[0] if isinstance(args[0], list) else args
        tensors = [each for each in listed if type(each) is torch.Tensor]
        theirs = [t for t in tensors if t.untyped_storage().data_ptr() in self._theirs]
        if theirs and not op.is_view:
            one_for_one = op.overloadpacket is torch.ops.aten.cat
            self.nbytes += sum(t.nbytes for t in theirs) if one_for_one else result.nbytes
        return result


def _bytes_read(staging_bytes: int | None) -> tuple[int, int]:
    """In a forward: of few ids, and of many."""
    read = []
    for count in (7, 48):
        layer = nn.Embedding(48, 6, dtype=torch.float64)
        wrapped = RotatedTensorParallel(layer, policy=_policy(staging_bytes))
        assert wrapped._ring.peers is not None
        with torch.no_grad(), _Reads(wrapped._ring.peers._memory) as reads:
            wrapped(_ids(count, 48))
        read.append(reads.nbytes)
    return read[0], read[1]


@pytest.mark.skipif(DEVICE_TYPE != "cpu", reason="a kernel reads by address, unseen by torch")
@multi_world_sizes
@pytest.mark.parametrize("staging_bytes", [None, TINY])
def test_no_more_is_read_than_is_needed(world_size: int, staging_bytes: int | None) -> None:
    row = 6 * torch.float64.itemsize
    for few, many in run_ranks(world_size, _bytes_read, staging_bytes):
        assert 0 < few <= 7 * row
        assert many == 48 * row * (world_size - 1) // world_size


class Tables(nn.Module):
    """Two in a row, one of them twice, and the first is the head, too."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(31, 6)
        self.places = nn.Embedding(12, 6)
        self.body = nn.Linear(6, 6)
        self.between = nn.Linear(6, 6)
        self.head = nn.Linear(6, 31, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids) + self.places(ids % 12)
        x = self.between(self.body(x).tanh()) + self.places(ids % 5)
        return self.head(x.tanh())


def _train_tables(inplace: bool, staging_bytes: int | None, raise_at: int = 0) -> list[int]:
    """Barriers of each step; batches differ in length from rank to rank.

    Cells that are read are not fetched in vain, but for an exception.
    """
    with _ways() as taken, _fetched() as fetched:
        barriers = _train_on_ids(inplace, staging_bytes, raise_at)
    assert fetched[True] == len(taken) + (raise_at > 0)
    return barriers


@contextmanager
def _fetched() -> Iterator[Counter[bool]]:
    """How many cells are fetched: to be read, and to be pulled."""
    counts: Counter[bool] = Counter()
    fetch = PeerTransport._fetch

    def counting(self: PeerTransport, cells: Any) -> None:
        counts.update(each.visit.reads for each in cells)
        fetch(self, cells)

    with patch.object(PeerTransport, "_fetch", counting):
        yield counts


def _train_on_ids(inplace: bool, staging_bytes: int | None, raise_at: int) -> list[int]:
    ranks, rank = dist.get_world_size(), dist.get_rank()
    torch.manual_seed(0)
    dense = Tables().to(device(), torch.float64)
    policy = _policy(staging_bytes)
    wrapped = RotatedTensorParallel(deepcopy(dense), inplace=inplace, policy=policy)
    assert wrapped._ring.peers is not None
    optimizers = [sgd(model.parameters()) for model in (dense, wrapped)]
    barriers = []
    for step in range(3):
        before = wrapped._ring.peers.barriers
        ids = _ids(1 + 9 * ((rank + step) % ranks), 31, step)
        if step == 1 and raise_at:
            with _raising(raise_at), pytest.raises(MemoryError):
                wrapped(ids)
        for optimizer, model in zip(optimizers, (dense, wrapped), strict=True):
            optimizer.zero_grad()
            mean_square(model(ids)).backward()
        for name, parameter in dense.named_parameters():
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad)
            parameter.grad /= ranks
            torch.testing.assert_close(
                full(wrapped.get_parameter(name).grad), parameter.grad, **FP64
            )
        for optimizer in optimizers:
            optimizer.step()
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                torch.testing.assert_close(wrapped(ids), dense(ids), **FP64)
        barriers.append(wrapped._ring.peers.barriers - before)
    return barriers


@contextmanager
def _raising(at: int) -> Iterator[None]:
    read, calls = Lookup.read, 0

    def raising(self: Lookup, published: Published) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            raise MemoryError("as if it were out of memory")
        read(self, published)

    with patch.object(Lookup, "read", raising):
        yield


@multi_world_sizes
@pytest.mark.parametrize("inplace", [False, True], ids=["overlap", "inplace"])
def test_several_tables_among_other_layers_train_as_the_dense_model(
    world_size: int, inplace: bool
) -> None:
    """What comes next is known from the second step on, and must take no more barriers for it."""
    for staging_bytes in (TINY,) if inplace else (None, TINY):
        for barriers in run_ranks(world_size, _train_tables, inplace, staging_bytes):
            assert max(barriers) == barriers[0]


@multi_world_sizes
def test_after_an_exception_on_all_ranks_training_goes_on(world_size: int) -> None:
    for at in (1, 3):
        run_ranks(world_size, _train_tables, False, None, at)


def _late_reader() -> None:
    """A rank reads late, and the layers after it fill all slots; what it reads stays there."""
    torch.manual_seed(0)
    # Cells of a slot each, on any number of ranks: five rows of the table, or all of a layer.
    rows = 10 * dist.get_world_size()
    model = nn.Sequential(nn.Embedding(rows, 4), *[nn.Linear(4, 4, bias=False) for _ in range(6)])
    model = model.to(device(), torch.float64)
    wrapped = RotatedTensorParallel(deepcopy(model), policy=_policy())
    read = Lookup.read

    def late(self: Lookup, published: Published) -> None:
        if dist.get_rank() == 0:
            if DEVICE_TYPE == "cuda":
                torch.cuda._sleep(10_000_000)
            time.sleep(0.02)
        read(self, published)

    ids = torch.arange(rows - 5, rows, device=device())  # the last cell, of the last rank
    with torch.no_grad(), patch.object(Lookup, "read", late):
        for _ in range(4):
            torch.testing.assert_close(wrapped(ids), model(ids), **FP64)


@multi_world_sizes
def test_what_a_rank_reads_stays_until_it_has_read_it(world_size: int) -> None:
    run_ranks(world_size, _late_reader)


class Sometimes(nn.Module):
    """A table, of many cells, between two layers, or not."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.table = nn.Embedding(60, 4)
        self.second = nn.Linear(4, 4, bias=False)
        self.looks_up = False

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.second(x + self.table(ids) if self.looks_up else x)


def _surprise() -> None:
    torch.manual_seed(0)
    model = Sometimes().to(device(), torch.float64)
    wrapped: Any = RotatedTensorParallel(deepcopy(model), policy=_policy())
    x, ids = torch.ones(3, 4, dtype=torch.float64, device=device()), _ids(3, 60)
    with torch.no_grad():
        for looks_up in (False, False, True, True, False, True):
            wrapped.module.looks_up = model.looks_up = looks_up
            torch.testing.assert_close(wrapped(x, ids), model(x, ids), **FP64)


@multi_world_sizes
def test_a_table_may_come_where_another_layer_was_expected(world_size: int) -> None:
    """And the other way round. What was fetched for that layer is gone when its turn comes."""
    run_ranks(world_size, _surprise)


def _low_precision(dtype: torch.dtype, mixed: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Embedding(70, 16, dtype=torch.float32 if mixed else dtype, device=device())
    wrapped = RotatedTensorParallel(
        nn.Sequential(deepcopy(layer)),
        policy=_policy(),
        mixed_precision=MixedPrecisionPolicy(param_dtype=dtype if mixed else None),
    )
    for ids in (_ids(9, 70), _ids(9, 70).int(), _ids(8, 70).view(2, 4).t(), _ids(1, 70).expand(5)):
        assert torch.equal(wrapped(ids), layer.weight.to(dtype)[ids])


@multi_world_sizes
def test_rows_of_any_dtype_are_read_by_ids_of_any_kind(world_size: int) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        run_ranks(world_size, _low_precision, dtype, mixed=False)
    run_ranks(world_size, _low_precision, torch.bfloat16, mixed=True)


@given(data=st.data(), world_size=st.sampled_from([2, 3, 4]))
@settings(max_examples=settings().max_examples // 3)
def test_whatever_ranks_look_up(data: st.DataObject, world_size: int) -> None:
    run_ranks(
        world_size,
        _check,
        data.draw(st.integers(1, 90), "rows"),
        data.draw(st.integers(1, 40), "cols"),
        data.draw(st.lists(st.integers(0, 90), min_size=world_size, max_size=world_size), "counts"),
        inplace=data.draw(st.booleans(), "inplace"),
        staging_bytes=data.draw(st.integers(TINY, 16 * TINY), "staging"),
    )


def _captured() -> None:
    """Ids change from replay to replay, in the memory that the graph reads them from."""
    table = nn.Embedding(60, 16, device=device())
    wrapped = RotatedTensorParallel(nn.Sequential(table), policy=_policy())
    weight = full(wrapped[0].weight.detach())
    ids, graph, stream = _ids(9, 60), torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad():
        with torch.cuda.stream(stream):
            for _ in range(3):
                wrapped(ids)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            y = wrapped(ids)
        for step in range(1, 4):
            ids.copy_(_ids(9, 60, step))
            graph.replay()
            assert torch.equal(y, weight[ids])
    torch.cuda.synchronize()


@pytest.mark.skipif(DEVICE_TYPE != "cuda", reason="graphs are CUDA's")
@multi_world_sizes
def test_a_captured_forward_looks_up_what_the_ids_are_by_then(world_size: int) -> None:
    run_ranks(world_size, _captured)


# The kernel, of which there is an interpreter for CPUs.


def _copied(copy_rows: Any, table: torch.Tensor, grid: TileGrid, ids: torch.Tensor) -> torch.Tensor:
    """The rows of ``ids`` out of as many memories as the grid has owners, cell by cell."""
    at, ranks, shard_rows = 32, grid.world_size, grid.shard(0).shape[0]
    nbytes = at + grid.max_numel * table.itemsize
    memories = torch.zeros(ranks, -(-nbytes // 16) * 16, dtype=torch.uint8, device=table.device)
    addresses = torch.tensor([each.data_ptr() for each in memories], device=table.device)
    y = torch.full((len(ids), table.shape[1]), -1, dtype=table.dtype, device=table.device)
    for row, col in grid.cells():
        tiles = []
        for owner in range(ranks):
            tile = grid.tile(owner, (row, col))
            values = memories[owner, at:][: tile.numel * table.itemsize].view(table.dtype)
            values.copy_(table[tile.rows, tile.cols].reshape(-1))
            if tile.numel:
                tiles.append((tile, values.view(tile.shape)))
        rows, cols = grid.cell
        expected, inside = y.clone(), (ids % shard_rows >= row) & (ids % shard_rows < row + rows)
        expected[inside, col : col + cols] = table[ids[inside], col : col + cols]
        copy_rows(Published(tiles, addresses, at, shard_rows, row, rows), ids, y)
        assert torch.equal(y, expected)
    return y


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(11, 16), (3, 1), (13, 300), (9, 1500)])
def test_the_kernel_copies_the_rows_of_a_cell(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Four memories, cells of two rows and 1100 columns at most; other rows stay as they are."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE_TYPE, dtype)
    grid = TileGrid(shape, 0, 4, 2 * min(shape[1], 1100))
    last = shape[0] - 1
    for ids in (
        torch.arange(shape[0]).flip(0),
        torch.tensor([last, 0, 0]).int(),
        torch.tensor([last, 1, 0, 1])[::2],
        torch.tensor([last]).expand(3),
        torch.tensor([], dtype=torch.int64),
    ):
        ids = ids.to(DEVICE_TYPE)
        with kernel("ops.row_kernel") as module:
            assert torch.equal(_copied(module.copy_rows, table, grid, ids), table[ids])


def _interpreted() -> int:
    """The kernel in the place of the host's own way, among ranks."""
    calls = 0

    def counted(*args: Any) -> None:
        nonlocal calls
        calls += 1
        module.copy_rows(*args)

    with kernel("ops.row_kernel") as module, patch.object(lookup, "_copier", lambda kind: counted):
        for rows, cols in ((40, 6), (21, 3), (9, 40)):
            _check(rows, cols, [0, 2 * rows, 1, 3][: dist.get_world_size()])
    return calls


@needs_triton
@pytest.mark.skipif(DEVICE_TYPE != "cpu", reason="elsewhere all tests run the kernel")
@multi_world_sizes
def test_the_kernel_reads_the_memories_of_other_ranks(world_size: int) -> None:
    assert all(run_ranks(world_size, _interpreted))
