"""Casting what goes into a module, or comes out of it, whatever it is packed in."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence

from rtp_wrap.policy import MixedPrecisionPolicy


def cast_inputs(inputs: Any, precision: MixedPrecisionPolicy) -> Any:
    """A module's ``(args, kwargs)`` in the dtype in which it computes, if the policy casts them."""
    if precision.param_dtype is None or not precision.cast_forward_inputs:
        return inputs
    return cast_floats(inputs, precision.param_dtype)


def cast_floats(value: Any, dtype: torch.dtype) -> Any:
    """``value`` with every floating-point tensor in it as ``dtype``; the same object if none is.

    Looks into lists, tuples, dictionaries, dataclasses and packed sequences, of whatever class. A
    tensor that is there several times (as query, key and value) is so afterwards.
    """
    return _cast(value, dtype, {})


def _cast(value: Any, dtype: torch.dtype, done: dict[int, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        if not value.is_floating_point() or value.dtype == dtype:
            return value
        if id(value) not in done:
            done[id(value)] = value.to(dtype)
        return done[id(value)]
    if isinstance(value, PackedSequence):
        return value.to(dtype)
    if isinstance(value, dict):
        cast = {key: _cast(each, dtype, done) for key, each in value.items()}
        return value if all(cast[key] is value[key] for key in cast) else _like(value, cast)
    if isinstance(value, list | tuple):
        parts = [_cast(each, dtype, done) for each in value]
        if all(new is old for new, old in zip(parts, value, strict=True)):
            return value
        if isinstance(value, tuple) and hasattr(value, "_fields"):  # a named tuple
            return type(value)(*parts)
        return type(value)(parts)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [each.name for each in dataclasses.fields(value) if each.init]
        changed = {name: _cast(getattr(value, name), dtype, done) for name in fields}
        if all(changed[name] is getattr(value, name) for name in fields):
            return value
        return dataclasses.replace(value, **changed)
    return value


def _like(value: dict[Any, Any], entries: dict[Any, Any]) -> Any:
    """A dictionary of the class of ``value``: some (Hugging Face's outputs) are dataclasses too."""
    if dataclasses.is_dataclass(value):
        return type(value)(**entries)
    copy = value.copy()
    copy.update(entries)
    return copy
