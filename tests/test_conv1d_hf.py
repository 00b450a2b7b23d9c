"""Hugging Face's `Conv1D`, a linear layer with weight [in, out], on a rotating weight.

Also runs as ranks of a job: `torchrun --nproc_per_node=2 -m pytest tests/test_conv1d_hf.py`, or
`python -m torch.distributed.launch --nproc_per_node=2 tests/test_conv1d_hf.py`.

Most tests use a stand-in, under the library's name, for which the library need not be there.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rtp_wrap import Gather, Rotate, RotatedTensorParallel, ShardingPolicy
from rtp_wrap.modules import rotation_dim
from rtp_wrap.modules.linear import RotatedConv1D
from tests.families import HAS_TRANSFORMERS
from tests.parity import check_parity
from tests.ranks import WORLD_SIZES, all_world_sizes, device, run_ranks
from tests.rotated import TINY, dims

LIBRARY = "transformers.pytorch_utils"


class Conv1D(nn.Module):
    """What the library's class computes."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf) * 0.02)
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.addmm(self.bias, x.flatten(0, -2), self.weight)
        return y.view(*x.shape[:-1], self.nf)


class OwnForward(Conv1D):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


@contextmanager
def _stand_in() -> Iterator[None]:
    """As if the library had been imported, with ``Conv1D`` of this file."""
    before = sys.modules.get(LIBRARY)
    module: Any = ModuleType(LIBRARY)
    module.Conv1D = Conv1D
    sys.modules[LIBRARY] = module
    try:
        yield
    finally:
        del sys.modules[LIBRARY]
        if before is not None:
            sys.modules[LIBRARY] = before


def _random(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _block(kind: Any, sizes: tuple[int, int]) -> nn.Sequential:
    inputs, hidden = sizes
    return nn.Sequential(kind(hidden, inputs), nn.GELU(), kind(inputs, hidden))


def _train(
    kind: Any, sizes: tuple[int, int], dim: int, inplace: bool, staging_bytes: int | None
) -> None:
    wrapped = check_parity(
        lambda: _block(kind, sizes),
        lambda step, rank: (_random(2, 3, sizes[0], seed=10 * step + rank),),
        steps=2,
        policy=ShardingPolicy(
            # By columns, the outputs', is the default.
            rules={} if dim == 1 else {"*.weight": Rotate(0)},
            replicate_below=0,
            staging_bytes=staging_bytes,
        ),
        inplace=inplace,
    )
    for layer in (wrapped[0], wrapped[2]):
        assert isinstance(layer, RotatedConv1D)
        assert layer._adoption.strategies == {"weight": Rotate(dim), "bias": Gather()}


def _train_stand_in(**options: Any) -> None:
    with _stand_in():
        _train(Conv1D, **options)


@all_world_sizes
@pytest.mark.parametrize("inplace", [False, True])
@dims
def test_training_is_that_of_the_dense_model(world_size: int, dim: int, inplace: bool) -> None:
    for sizes, staging_bytes in (((7, 10), None), ((3, 2), None), ((150, 11), TINY)):
        run_ranks(
            world_size, _train_stand_in, sizes=sizes, dim=dim, inplace=inplace,
            staging_bytes=staging_bytes,
        )  # fmt: skip


@given(
    world_size=st.sampled_from(WORLD_SIZES),
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    dim=st.sampled_from([0, 1]),
    inplace=st.booleans(),
    staging_bytes=st.integers(TINY, 8 * TINY),
)
@settings(max_examples=settings().max_examples * 2 // 5)
def test_training_is_right_whatever_the_options(world_size: int, **options: Any) -> None:
    run_ranks(world_size, _train_stand_in, **options)


def _description() -> str:
    with _stand_in():
        layer = Conv1D(6, 5).to(device())
        RotatedTensorParallel(layer, policy=ShardingPolicy(replicate_below=0))
    return repr(layer)


@all_world_sizes
def test_the_repr_shows_the_sharding(world_size: int) -> None:
    expected = f"Conv1D(weight: Rotate(dim=1), 1/{world_size} per rank)"
    assert run_ranks(world_size, _description) == [expected] * world_size


def test_only_what_computes_like_the_librarys_class_is_rotated() -> None:
    assert rotation_dim(Conv1D(4, 3), "weight") is None  # of this name, but not that class
    with _stand_in():
        assert rotation_dim(Conv1D(4, 3), "weight") == 1
        assert rotation_dim(Conv1D(4, 3), "bias") is None
        assert rotation_dim(OwnForward(4, 3), "weight") is None
        assert rotation_dim(nn.Linear(4, 3), "weight") == 0


def test_the_library_is_not_imported_for_it(tmp_path: Path) -> None:
    package = tmp_path / "transformers"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "pytorch_utils.py").touch()
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), root])}
    program = (
        "import sys, torch, rtp_wrap.modules as modules\n"
        "assert modules.rotation_dim(torch.nn.Linear(3, 4), 'weight') == 0\n"
        "assert modules.rotation_dim(torch.nn.LayerNorm(3), 'weight') is None\n"
        "loaded = [name for name in sys.modules if name.startswith('transformers')]\n"
        "assert not loaded, loaded\n"
    )
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=100)


# With the library itself.

needs_library = pytest.mark.skipif(not HAS_TRANSFORMERS, reason="needs transformers")


def _train_library(dim: int, inplace: bool) -> None:
    from transformers.pytorch_utils import Conv1D

    for sizes, staging_bytes in (((7, 10), None), ((150, 11), TINY)):
        _train(Conv1D, sizes, dim, inplace, staging_bytes)


@needs_library
@all_world_sizes
@pytest.mark.parametrize("dim", (0, 1))
def test_the_librarys_layer_trains_like_the_dense_one(world_size: int, dim: int) -> None:
    for inplace in (False, True):
        run_ranks(world_size, _train_library, dim, inplace)


class Logits(nn.Module):
    """GPT-2: every linear layer but the head is a ``Conv1D``, and the head is the embedding."""

    def __init__(self) -> None:
        from transformers import GPT2Config, GPT2LMHeadModel

        super().__init__()
        self.gpt = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=31, n_positions=8, n_embd=12, n_layer=2, n_head=3,
                resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            )
        )  # fmt: skip

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.gpt(input_ids=ids).logits


def _train_gpt() -> None:
    def batch(step: int, rank: int) -> tuple[torch.Tensor]:
        generator = torch.Generator().manual_seed(10 * step + rank)
        return (torch.randint(31, (2, 8), generator=generator),)

    wrapped = check_parity(
        Logits, batch, policy=ShardingPolicy(replicate_below=0, staging_bytes=TINY)
    )
    rotated = [module for module in wrapped.modules() if isinstance(module, RotatedConv1D)]
    assert len(rotated) == 8
    assert wrapped.gpt.transformer.wte.weight is wrapped.gpt.lm_head.weight


@needs_library
@all_world_sizes
def test_gpt2_trains_like_the_dense_one(world_size: int) -> None:
    run_ranks(world_size, _train_gpt)
