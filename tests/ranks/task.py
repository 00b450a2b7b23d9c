"""A function call as bytes, and its execution on a rank."""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch

from tests.ranks.group import DEVICE_TYPE
from tests.ranks.outcome import Failure, Outcome

_SEED = 0


def encode(*call: Any) -> bytes:
    """Pickle a function by reference, its arguments and its keyword arguments by value."""
    # Plain pickle copies tensors; the pickler of multiprocessing would share their memory.
    return pickle.dumps(call)


def execute(task: bytes) -> Outcome:
    """Make the call on this rank."""
    try:
        function, args, kwargs = pickle.loads(task)
        # A test must not depend on what ran before it in this process.
        torch.manual_seed(_SEED)
        result = function(*args, **kwargs)
        if DEVICE_TYPE == "cuda":
            torch.cuda.synchronize()  # an asynchronous error belongs to this task
        buffer = io.BytesIO()
        _ResultPickler(buffer).dump(result)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # pytest.fail, for one, is no `Exception`
        return Failure.of(error)
    return buffer.getvalue()


class _ResultPickler(pickle.Pickler):
    """Pickles every tensor, however deep in the result, as a detached one on the CPU."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return NotImplemented
        tensor = value.detach()
        if tensor.is_cuda:
            tensor = tensor.cpu()
        return tensor.__reduce_ex__(pickle.DEFAULT_PROTOCOL)
