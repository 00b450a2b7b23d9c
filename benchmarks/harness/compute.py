"""Parts of a plain step on one rank, measured alone."""

from __future__ import annotations

import torch

from harness.hardware import this_device
from harness.link import seconds
from harness.strategies import STRATEGIES, apply
from harness.trial import Trial, adamw


def optimizer_seconds(trial: Trial) -> float:
    """Of the optimizer's part of the step of ``trial``, with gradients that are there already."""
    device = this_device()
    model = apply(STRATEGIES["single"], trial.spec().build(), trial.setting, device)
    optimizer = adamw(model, device)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return seconds(optimizer.step)


def floor_seconds(tokens: int, features: int, rows: int, dtype: torch.dtype) -> float:
    """Of the product of ``[tokens, features]`` and a tile of ``[rows, features]``."""
    x = torch.randn(tokens, features, dtype=dtype, device=this_device())
    tile, y = x.new_empty(rows, features).normal_(), x.new_empty(tokens, rows)
    return seconds(lambda: torch.mm(x, tile.t(), out=y))
