"""``nn.TransformerEncoder`` and its layers, which have a fast path of their own in inference.

On that path a layer hands all its weights to one kernel and calls none of its modules, and an
encoder makes nested tensors of padded inputs. Where something in them rotates, the path is closed:
both then compute what they compute in training. Unlike on the fast path, outputs at padded
positions are not zeros then, but what the layers make of them.

torch has one switch for the whole process, ``torch.backends.mha.set_fastpath_enabled``, which other
models and threads would feel. Here only the attributes say so that a module itself tests.
"""

from __future__ import annotations

from torch import nn

from rtp_wrap.modules.adopted import Adopted


class AdoptedEncoder(Adopted):
    """An adopted ``nn.TransformerEncoder`` that keeps padded inputs as they are."""

    @property
    def use_nested_tensor(self) -> bool:
        return False

    @use_nested_tensor.setter
    def use_nested_tensor(self, value: bool) -> None:
        """Stays off."""


class AdoptedEncoderLayer(Adopted):
    """An adopted ``nn.TransformerEncoderLayer`` that always calls its modules."""

    @property
    def activation_relu_or_gelu(self) -> int:
        """Which activation the fast path would compute: none that it knows."""
        return 0

    @activation_relu_or_gelu.setter
    def activation_relu_or_gelu(self, value: int) -> None:
        """Stays none."""


def without_fast_path(module: nn.Module) -> type[Adopted] | None:
    """The form in which ``module`` has no fast path, if it has one."""
    if isinstance(module, nn.TransformerEncoder):
        return AdoptedEncoder
    return AdoptedEncoderLayer if isinstance(module, nn.TransformerEncoderLayer) else None
