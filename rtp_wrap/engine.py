"""What autograd's engine is asked and told, where torch has no public call for it.

The only file that knows those private ones; torch 2.11 to 2.13 have them, and parts of torch that
need the same use them: FSDP2, ``torch.utils.checkpoint``.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.autograd.function import _SingleLevelFunction
from torch.utils import _python_dispatch as dispatch
from torch.utils.checkpoint import _CachedTorchDispatchMode, _CachingTorchDispatchMode

_NOTHING = nullcontext()
Result = TypeVar("Result")
PackHooks = tuple[Callable[[torch.Tensor], Any], Callable[[Any], torch.Tensor]]


if TYPE_CHECKING:
    Function = torch.autograd.Function
else:
    #: That one without looking for ``torch.func`` transforms in every call, which takes the host
    #: some microseconds. They are refused where a layer takes its home shard.
    Function = _SingleLevelFunction

#: The number of the backward that runs in this thread, the innermost; -1 for none.
running_backward: Callable[[], int] = torch._C._current_graph_task_id


def is_transformed() -> bool:
    """Whether a transform of ``torch.func`` is at work, ``vmap`` or ``grad`` for example."""
    return torch._C._are_functorch_transforms_active()


def at_its_end(call: Callable[[], None]) -> None:
    """Have ``call`` called when the backward that runs now is over; not if it raises."""
    torch.autograd.Variable._execution_engine.queue_callback(call)


#: The saved-tensor hooks that are asked now: the top ones of a stack.
hooks_in_force: Callable[[], PackHooks | None]
hooks_in_force = partial(torch._C._autograd._top_saved_tensors_default_hooks, False)


def unhooked(call: Callable[[], Result]) -> Result:
    """What ``call`` returns, with no saved-tensor hooks in force.

    Work of a process group remembers the state of its thread: if it is kept, so are the hooks, and
    all that they have saved.
    """
    hooks: list[PackHooks] = []
    while (top := hooks_in_force()) is not None:
        torch._C._autograd._pop_saved_tensors_default_hooks()
        hooks.append(top)
    try:
        return call()
    finally:
        for pack, unpack in reversed(hooks):
            torch._C._autograd._push_saved_tensors_default_hooks(pack, unpack)


def hooks_are_disabled() -> bool:
    """Whether saved-tensor hooks cannot be entered."""
    return torch._C._autograd._saved_tensors_hooks_get_disabled_error_message() is not None


def only_accumulates(tensor: torch.Tensor, accumulator: Any) -> bool:
    """Whether the backward that runs adds the gradient of ``tensor`` to ``.grad``, unseen.

    Not where it is no leaf, or was frozen since; where its hooks or ``torch.autograd.grad`` take
    the gradient; or where anomaly mode looks for NaNs in what nodes return. ``accumulator`` is the
    node that adds; hooks of that node are not found.
    """
    if not (tensor.is_leaf and tensor.requires_grad) or torch.is_anomaly_enabled():
        return False
    if tensor._backward_hooks or tensor._post_accumulate_grad_hooks:
        return False
    try:
        return torch._C._will_engine_execute_node(accumulator)
    except RuntimeError:  # it is what torch.autograd.grad() is to find
        return False


def unseen_by_checkpoints() -> AbstractContextManager[object]:
    """A block whose operations selective checkpointing does not count.

    It takes those of a recomputation, by their kind and number, for those of the forward.
    """
    if torch._C._len_torch_dispatch_stack():
        for mode in dispatch._get_current_dispatch_mode_stack():
            if isinstance(mode, _CachingTorchDispatchMode | _CachedTorchDispatchMode):
                return dispatch._disable_current_modes()
    return _NOTHING
