"""What a number depends on besides the code: the machine, the versions, the command, the day."""

from __future__ import annotations

import functools
import os
import platform
import shlex
import sys
from datetime import datetime, timezone

import torch


@functools.cache
def describe() -> dict[str, str]:
    """This process' command, hardware, versions and start."""
    return {
        "command": shlex.join(["python", *sys.argv]),
        "hardware": devices(),
        "versions": _versions(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def this_device() -> torch.device:
    """This rank's, where it has chosen its GPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def devices() -> str:
    """Such as "4 × NVIDIA H200" or "CPU, 2 cores (x86_64)"."""
    if not torch.cuda.is_available():
        return f"CPU, {os.cpu_count()} cores ({platform.machine()})"
    names = [device_name(index) for index in range(torch.cuda.device_count())]
    return ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))


def device_name(index: int = 0) -> str:
    """What the GPU calls itself; "CPU" where there is none."""
    return torch.cuda.get_device_name(index) if torch.cuda.is_available() else "CPU"


def _versions() -> str:
    versions = [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    if torch.cuda.is_available():
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        versions += [f"CUDA {torch.version.cuda}", f"NCCL {nccl}"]
    return ", ".join(versions)
