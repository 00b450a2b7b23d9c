"""``nn.RNN``, ``nn.LSTM`` and ``nn.GRU``, which keep a list of weights besides the parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from rtp_wrap.modules.adopted import Adopted
from rtp_wrap.modules.adoption import Adoption
from rtp_wrap.modules.frame import frame_of
from rtp_wrap.policy import Gather


class AdoptedRecurrent(Adopted):
    """Reads the list of weights through the parameters, each time; what torch stores is dropped."""

    _compiles = False
    _flat_weights_names: list[str]
    flatten_parameters: Callable[[], None]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        adoption = self._adoption
        if adoption is None:
            return super().forward(*args, **kwargs)
        sharded = any(isinstance(each, Gather) for each in adoption.strategies.values())
        if sharded and adoption.ring.device.type == "cuda" and torch.is_grad_enabled():
            # cuDNN keeps a packed copy of the whole weights for backward. It is dropped, and made
            # again by another forward when backward comes: memory before time, as everywhere here.
            return checkpoint(self._run, adoption, False, *args, use_reentrant=False, **kwargs)
        return self._run(adoption, True, *args, **kwargs)

    def _run(self, adoption: Adoption, regather: bool, *args: Any, **kwargs: Any) -> Any:
        with frame_of(self, adoption, regather):
            # Read once: what reads as a plain tensor under no_grad, as in `flatten_parameters`, is
            # another one than outside.
            vars(self)["_whole_weights"] = self._flat_weights
            try:
                self.flatten_parameters()  # cuDNN wants the gathered weights in one piece
                return super(Adopted, self).forward(*args, **kwargs)
            finally:
                del vars(self)["_whole_weights"]

    @property
    def _flat_weights(self) -> list[Any]:
        if "_whole_weights" in vars(self):
            return vars(self)["_whole_weights"]
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, weights: list[Any]) -> None:
        """Gathered weights must not outlive the forward that gathered them."""

    def _weights_have_changed(self) -> bool:
        return False


def is_recurrent(module: nn.Module) -> bool:
    return isinstance(module, nn.RNNBase)
