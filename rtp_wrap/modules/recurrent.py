"""``nn.RNN``, ``nn.LSTM`` and ``nn.GRU``, which keep a list of weights besides the parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from rtp_wrap.modules.adoption import Adopted
from rtp_wrap.modules.frame import Frame


class AdoptedRecurrent(Adopted):
    """Reads the list of weights through the parameters, each time; what torch stores is dropped."""

    _flat_weights_names: list[str]
    flatten_parameters: Callable[[], None]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._adoption is None:
            return super().forward(*args, **kwargs)
        with Frame(self, self._adoption):
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
