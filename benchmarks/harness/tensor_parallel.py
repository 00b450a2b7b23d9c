"""DTensor tensor parallelism of both models, as torchtitan's examples do it: heads and hidden
features split, sequence parallel norms, and logits that stay split over the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from llama import Block as LlamaBlock
from llama import Llama

#: Between blocks every rank has its part of the sequence.
SEQUENCE = Shard(1)


def parallelize(
    model: nn.Module, mesh: DeviceMesh, materialise: Callable[[nn.Module, str], None]
) -> None:
    """Turn ``model`` into its tensor parallel form, in place.

    ``materialise(module, fqn)`` is called for each child and block just before it is cut.
    """
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleList):
            for index, block in enumerate(child):
                materialise(block, f"{name}.{index}")
                _block(block, mesh)
        else:
            materialise(child, name)
    plan: dict[str, ParallelStyle] = {
        "head": ColwiseParallel(input_layouts=SEQUENCE, use_local_output=False)
    }
    if isinstance(model, Llama):
        plan["embedding"] = _embedding(SEQUENCE)
        plan["norm"] = SequenceParallel(use_local_output=True)
    else:  # positions are added to the whole sequence, then dropout gets its part
        plan["embedding"] = _embedding(Replicate())
        plan["dropout"] = PrepareModuleInput(
            input_layouts=Replicate(), desired_input_layouts=SEQUENCE, use_local_output=True
        )
    parallelize_module(model, mesh, plan)


def _embedding(output: Placement) -> ParallelStyle:
    return _Embedding(input_layouts=Replicate(), output_layouts=output)


class _Embedding(RowwiseParallel):
    """Waits for its output, which the first block uses at once.

    Of an ``AsyncCollectiveTensor`` a compiled block returns no gradient (torch 2.13).
    """

    @staticmethod
    def _prepare_output_fn(
        output_layouts: Any, use_local_output: bool, mod: nn.Module, outputs: Any, mesh: DeviceMesh
    ) -> Any:
        return outputs.redistribute(placements=output_layouts).to_local()


def _block(block: nn.Module, mesh: DeviceMesh) -> None:
    columns, rows = ["attention.q", "attention.k", "attention.v"], ["attention.out"]
    gathered = PrepareModuleInput(input_layouts=SEQUENCE, desired_input_layouts=Replicate())
    plan: dict[str, ParallelStyle] = {"attention": gathered}
    norm = SequenceParallel(use_local_output=True)
    gated = isinstance(block, LlamaBlock)
    if not gated:
        columns, rows = [*columns, "mlp.0"], [*rows, "mlp.3"]
        plan.update({"mlp": gathered, "mlp_norm": norm})
    else:  # gate and up share an input, which the norm before them gathers once
        columns, rows = [*columns, "gate", "up"], [*rows, "down"]
        plan["mlp_norm"] = SequenceParallel()
    plan["attention_norm"] = norm
    plan.update({name: ColwiseParallel() for name in columns})
    plan.update({name: RowwiseParallel(output_layouts=SEQUENCE) for name in rows})
    parallelize_module(block, mesh, plan)
    if gated:
        # A DTensor sums both uses' gradients before it communicates them, once.
        output = PrepareModuleOutput(
            output_layouts=SEQUENCE, desired_output_layouts=Replicate(), use_local_output=False
        )
        parallelize_module(block, mesh, {"mlp_norm": output})
