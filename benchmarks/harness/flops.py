"""Model FLOPs utilisation: of what a GPU could multiply, the share that a model's step needs.

Chowdhery et al., PaLM (arXiv 2204.02311, appendix B), count per token, forward and backward,

    6 P + 12 L H Q T

for P parameters, L layers, H heads of Q features each, and T tokens of a sequence. Here P are the
weights that multiply: linears and the head, but not the embedding, which is looked up, nor norms
and biases. And as a causal model needs only half of its T x T products, attention is 6 L H Q T.
What checkpointing computes again is not counted.
"""

from __future__ import annotations

import math

from harness.models import ModelSpec
from harness.strategies import Setting

#: TFLOP/s of dense products (no sparsity) by the name of the device, from NVIDIA's data sheets:
#: bf16 and fp16 on tensor cores; fp32 without them, as torch does it unless TF32 is allowed.
PEAK = {
    "NVIDIA A100-SXM4-40GB": {16: 312.0, 32: 19.5},
    "NVIDIA A100-SXM4-80GB": {16: 312.0, 32: 19.5},
    "NVIDIA H100 80GB HBM3": {16: 989.5, 32: 67.0},
    "NVIDIA H200": {16: 989.5, 32: 67.0},
    "NVIDIA B200": {16: 2250.0},
}


def per_token(spec: ModelSpec, seq_len: int) -> float:
    """FLOPs of a token's forward and backward, in sequences of ``seq_len``."""
    weights = sum(
        math.prod(parameter.shape)
        for name, parameter in spec.build().named_parameters()
        if parameter.ndim > 1 and name != "embedding.weight"
    )
    return 6.0 * weights + 6.0 * spec.layers * spec.dim * seq_len


def utilisation(flops_per_second: float, device: str, setting: Setting) -> float | None:
    """Of the peak of ``device`` at the precision of its products; ``None`` if unknown."""
    bits = setting.compute_dtype.itemsize * 8
    peak = PEAK.get(device, {}).get(bits)
    return None if peak is None else flops_per_second / (peak * 1e12)
