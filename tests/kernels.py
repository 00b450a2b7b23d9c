"""Kernels in Triton, on GPUs, and on CPUs by Triton's interpreter where Triton is installed."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import pytest

from tests.ranks import DEVICE_TYPE

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")


@contextmanager
def kernel(module: str) -> Iterator[Any]:
    """``module``, which has a kernel, by its name in ``rtp_wrap``."""
    interpret = {"TRITON_INTERPRET": "1"} if DEVICE_TYPE == "cpu" else {}
    with patch.dict(os.environ, interpret):
        yield importlib.import_module(f"rtp_wrap.{module}")
