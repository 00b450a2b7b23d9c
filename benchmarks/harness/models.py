"""The models that strategies are compared on, by name, on the meta device until a strategy has
decided what of them a rank keeps.

Both have an ``embedding``, ``blocks`` and a ``head``: strategies need to know no more of them.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

import llama
from harness import transformer_lm

_LLAMAS = {f"llama-{name}": shape for name, shape in llama.SHAPES.items()}
#: The models of the comparison: blocks of an 8B model, a vocabulary that lets few of them dominate.
_LLAMAS["llama-8b-layers"] = replace(llama.SHAPES["8b"], layers=8, vocab=32000)
_LLAMAS["llama-70b-layers"] = replace(llama.SHAPES["70b"], layers=4, vocab=32000)
_LLAMAS["llama-tiny"] = llama.Shape(layers=2, dim=64, ffn=128, heads=4, kv_heads=2, vocab=512)
_TRANSFORMERS = dict(transformer_lm.SHAPES)
_TRANSFORMERS["lm"] = transformer_lm.Shape(ninp=2048, nhid=2048, nhead=32, layers=5, vocab=10240)
_TRANSFORMERS["lm-tiny"] = transformer_lm.Shape(ninp=64, nhid=128, nhead=4, layers=2, vocab=512)

NAMES = (*_LLAMAS, *_TRANSFORMERS)


@dataclass(frozen=True)
class ModelSpec:
    """A model's name and sizes; what counting parameters and operations needs of either kind."""

    name: str
    shape: llama.Shape | transformer_lm.Shape

    @property
    def layers(self) -> int:
        return self.shape.layers

    @property
    def vocab(self) -> int:
        return self.shape.vocab

    @property
    def dim(self) -> int:
        return self.shape.dim if isinstance(self.shape, llama.Shape) else self.shape.ninp

    def build(self) -> nn.Module:
        """The model on the meta device."""
        with torch.device("meta"):
            if isinstance(self.shape, llama.Shape):
                return llama.Llama(self.shape)
            return transformer_lm.TransformerLM(self.shape)

    def parameters(self) -> int:
        """How many elements all weights have."""
        return sum(parameter.numel() for parameter in self.build().parameters())


def find(name: str, **changes: Any) -> ModelSpec:
    """The model of that name, some sizes changed: ``find("lm", layers=10)``; ``None`` changes none.

    Raises ``ValueError`` for an unknown name.
    """
    if name not in NAMES:
        raise ValueError(f"there is no model {name!r}; there are {', '.join(NAMES)}")
    shape = _LLAMAS.get(name) or _TRANSFORMERS[name]
    wanted = {key: value for key, value in changes.items() if value is not None}
    return ModelSpec(name, replace(shape, **wanted))


def initialise(module: nn.Module, fqn: str) -> None:
    """Set the parameters ``module`` itself owns: the same values whoever does it, on any rank."""
    initrange = vars(module).get("initrange")
    with torch.no_grad(), torch.random.fork_rng(_devices(module)):
        torch.manual_seed(zlib.crc32(fqn.encode()))
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim > 1 and initrange is not None:
                parameter.uniform_(-initrange, initrange)
            elif parameter.ndim > 1:
                parameter.normal_(std=0.02)
            elif name == "bias":
                parameter.zero_()
            else:
                parameter.fill_(1.0)


def materialise(module: nn.Module, fqn: str, device: torch.device) -> None:
    """Allocate and set everything inside ``module``, whose name in its model is ``fqn``."""
    module.to_empty(device=device)
    for name, inner in module.named_modules(prefix=fqn):
        initialise(inner, name)


def _devices(module: nn.Module) -> list[torch.device]:
    return list({p.device for p in module.parameters(recurse=False) if p.is_cuda})
