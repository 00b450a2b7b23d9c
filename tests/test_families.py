"""One line wraps the models that people train; plans of them are right."""

from __future__ import annotations

import warnings
from copy import deepcopy
from typing import Any

import pytest

if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))

import torch
import torch.distributed as dist

import rtp_wrap
from rtp_wrap import Rotate, RotatedTensorParallel, ShardingPolicy
from tests.families import (
    CONFIGS,
    FAMILIES,
    HAS_TIMM,
    HAS_TRANSFORMERS,
    TIMM,
    build,
    inputs,
    loss_of,
)
from tests.parity import FP64, compare_gradients, compare_weights, sgd
from tests.ranks import device, run_ranks

SHARDED = ShardingPolicy(replicate_below=0)
ALL = [
    *FAMILIES,
    *(
        pytest.param(
            name, marks=pytest.mark.skipif(not HAS_TRANSFORMERS, reason="needs transformers")
        )
        for name in CONFIGS
    ),
    *(
        pytest.param(name, marks=pytest.mark.skipif(not HAS_TIMM, reason="needs timm"))
        for name in TIMM
    ),
]
#: Two sizes of world are enough here: what differs between them is tested layer by layer.
sizes = pytest.mark.parametrize("world_size", [2, 3])


def _to_device(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value.to(device()) for key, value in values.items()}


def _check_family(name: str) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    # Norms and attention of Hugging Face's models compute in fp32, where a last bit of fp64 may
    # round the other way: 6e-8 relative, of elements of order 1.
    tolerance = FP64 if name in FAMILIES else {"rtol": 1e-6, "atol": 1e-7}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library's own, about itself
        torch.manual_seed(0)
        dense = build(name).to(device(), torch.float64)
        wrapped = RotatedTensorParallel(deepcopy(dense), policy=SHARDED)
        assert wrapped.plan.sites is None
        with torch.device("meta"):
            planned = rtp_wrap.plan(
                build(name).double(),
                world_size=world_size,
                policy=SHARDED,
                example_inputs=inputs(name, 0),
            )
        optimizers = sgd(dense.parameters()), sgd(wrapped.parameters())
        for step in range(3):
            parts = [_to_device(inputs(name, 10 * step + each)) for each in range(world_size)]
            whole = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
            for model, batch, optimizer in (
                (dense, whole, optimizers[0]),
                (wrapped, parts[rank], optimizers[1]),
            ):
                optimizer.zero_grad()
                output = model(**batch)
                loss_of(output).backward()
            compare_gradients(dense, wrapped, tolerance, f"step {step}")
            for optimizer in optimizers:
                optimizer.step()
            compare_weights(dense, wrapped, tolerance, f"step {step}")
        _check_plan(planned, wrapped)
        _check_entries(name, dense, wrapped)


def _check_plan(planned: Any, wrapped: Any) -> None:
    """Made without the weights, it is what was wrapped; and the traced order is the real one."""
    assert planned.parameters == wrapped.plan.parameters
    assert planned.staging_bytes == wrapped.staging_bytes
    assert any(isinstance(each.home, Rotate) for each in planned.parameters)
    owners = {use.module for each in planned.parameters for use in each.uses}
    traced = [site.fqn for site in planned.sites]
    assert set(traced) <= owners
    real = [site.fqn for site in wrapped.plan.sites]
    assert [fqn for fqn in real if fqn in set(traced)] == traced


def _check_entries(name: str, dense: Any, wrapped: Any) -> None:
    """Other doors than the forward: an inner module, and ``generate``."""
    dense.eval()
    wrapped.eval()
    with torch.no_grad():
        if name == "nanoGPT":
            ids = inputs(name, 5)["ids"].to(device())
            torch.testing.assert_close(wrapped.h[0](wrapped.wte(ids)), dense.h[0](dense.wte(ids)))
        if name in ("GPT-2", "Llama", "T5", "Mixtral"):
            ids = inputs(name, 5)["input_ids"].to(device())
            options = {"max_new_tokens": 4, "do_sample": False, "use_cache": True}
            assert torch.equal(wrapped.generate(ids, **options), dense.generate(ids, **options))


@sizes
@pytest.mark.parametrize("name", ALL)
def test_a_family_is_wrapped_in_one_line_and_trains_as_the_dense_model(
    world_size: int, name: str
) -> None:
    run_ranks(world_size, _check_family, name)


PAIRS = {
    "nanoGPT": ["c_fc", "c_out"],
    "nn.Transformer": ["linear1", "linear2"],
    "GPT-2": ["c_fc", "c_proj"],
    "Llama": ["gate_proj", "up_proj", "down_proj"],
    "BERT": ["dense", "dense"],
    "ViT": ["fc1", "fc2"],
    "T5": ["wi", "wo"],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ALL)
def test_a_trace_finds_sites_ties_shared_inputs_and_pairs(name: str) -> None:
    model = build(name).double().eval()  # dropout, even of nothing, is not pointwise in training
    planned = rtp_wrap.plan(model, world_size=2, policy=SHARDED, example_inputs=inputs(name, 0))
    assert planned.sites
    if name in PAIRS:
        found = {
            tuple(fqn.rpartition(".")[2] for fqn in (*pair.first, pair.last))
            for pair in planned.pairs
        }
        assert tuple(PAIRS[name]) in found
    if name in ("nanoGPT", "GPT-2", "BERT", "T5"):
        assert any(len(each.uses) > 1 for each in planned.parameters)
    if name in ("Llama", "BERT", "ViT", "T5"):
        readers = [site.reads for site in planned.sites]
        assert any(readers.count(each) >= 3 for each in readers)  # q, k and v
    assert str(planned)
