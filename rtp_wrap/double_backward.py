"""What sharded layers do not have."""

from __future__ import annotations

import torch


def refuse_double_backward(fqn: str) -> None:
    """Raise if the backward that is running builds a graph of itself (``create_graph=True``).

    Called first in every backward that communicates: a gradient of the gradient would need its
    own.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{fqn}: double backward (create_graph=True) is not supported by wrapped layers; "
            f"Ignore() in the policy leaves a layer's parameters out"
        )
