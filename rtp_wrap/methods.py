"""Methods besides ``forward`` that compute with a wrapped model's parameters."""

from __future__ import annotations

from inspect import getattr_static, isfunction

from torch import nn

from rtp_wrap.modules import Adopted, add_forward_method
from rtp_wrap.wrapper import RotatedTensorParallel


def register_forward_method(module: nn.Module, name: str) -> None:
    """Have method ``name`` of ``module`` run as its forward does.

    In a method such as ``forward_features`` or ``encode_image`` that is called from outside of any
    forward, the parameters of its own module are DTensors. After this they are plain tensors there,
    and inputs and outputs are cast as those of a forward are. Layers that it calls need nothing.

    ``module`` is what ``RotatedTensorParallel`` returned, or a module in it. Copies made of it
    later have the method, too. What a generator yields is computed outside of it.

    Raises ``ValueError`` if ``module`` is no part of a wrapped model, has no parameters, or has no
    such method in its class.
    """
    if isinstance(module, RotatedTensorParallel):
        module = module.module
    kind = type(module).__name__
    if not isinstance(module, Adopted) or module._adoption is None:
        raise ValueError(
            f"{name} of a {kind}: it is no module of a wrapped model, or has no parameters that "
            f"are managed: wrap first, then register"
        )
    fqn = module._adoption.name(name)
    if name in vars(module):
        raise ValueError(f"{fqn} was set on the object: register a method of its class, {kind}")
    if not isfunction(getattr_static(type(module), name, None)):
        raise ValueError(f"{fqn} is no method of {kind}")
    add_forward_method(module, name)
