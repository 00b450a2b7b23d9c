"""What autograd's engine is asked and told, where torch has no public call for it.

The only file that knows those private ones; torch 2.11 to 2.13 have them, and parts of torch that
need the same use them: FSDP2, ``torch.utils.checkpoint``.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils import _python_dispatch as dispatch
from torch.utils.checkpoint import _CachedTorchDispatchMode, _CachingTorchDispatchMode

_NOTHING = nullcontext()
PackHooks = tuple[Callable[[torch.Tensor], Any], Callable[[Any], torch.Tensor]]


def running_backward() -> int:
    """The number of the backward that runs in this thread, the innermost; -1 for none."""
    return torch._C._current_graph_task_id()


def at_its_end(call: Callable[[], None]) -> None:
    """Have ``call`` called when the backward that runs now is over; not if it raises."""
    torch.autograd.Variable._execution_engine.queue_callback(call)


def hooks_in_force() -> PackHooks | None:
    """The saved-tensor hooks that are asked now: the top ones of a stack."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


def hooks_are_disabled() -> bool:
    """Whether saved-tensor hooks cannot be entered."""
    return torch._C._autograd._saved_tensors_hooks_get_disabled_error_message() is not None


def order_of(node: Any) -> int:
    """The number of a node: of those that are ready, autograd runs the one with the highest."""
    number: int = node._sequence_nr()
    return number


def put_in_order(node: Any, number: int) -> None:
    """Give ``node`` the ``number``, instead of one that is higher than all before."""
    node._set_sequence_nr(number)


def unseen_by_checkpoints() -> AbstractContextManager[object]:
    """A block whose operations selective checkpointing does not count.

    It takes those of a recomputation, by their kind and number, for those of the forward.
    """
    if torch._C._len_torch_dispatch_stack():
        for mode in dispatch._get_current_dispatch_mode_stack():
            if isinstance(mode, _CachingTorchDispatchMode | _CachedTorchDispatchMode):
                return dispatch._disable_current_modes()
    return _NOTHING
