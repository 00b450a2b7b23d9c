"""Names of modules and parameters as the author of a model knows them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

#: What ``torch.compile(module)`` returns has the module under this name.
_COMPILED = "_orig_mod"


def own_name(fqn: str) -> str:
    """``fqn``, or a glob over fqns, without what ``model.block = torch.compile(block)`` adds."""
    return ".".join(part for part in fqn.split(".") if part != _COMPILED)


def own_names(model: nn.Module, all_uses: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """The modules of ``model``, as ``named_modules`` has them, by their own names.

    What was compiled comes behind what ``torch.compile`` made of it, under the same name.
    ``all_uses`` has modules that are used in several places under each of their names.
    """
    for fqn, module in model.named_modules(remove_duplicate=not all_uses):
        yield own_name(fqn), module
