"""Real text as bytes: the sources of Python's own standard library, or a file of yours."""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

VALIDATION_SHARE = 0.05


def read_text(file: Path | None, limit: int) -> bytes:
    """Return at most `limit` bytes of `file`, or of the standard library's sources."""
    if file is not None:
        with file.open("rb") as stream:
            return stream.read(limit)
    data = bytearray()
    for path in _standard_library():
        data += path.read_bytes()
        if len(data) >= limit:
            break
    return bytes(data[:limit])


def _standard_library() -> list[Path]:
    """List the standard library's `.py` files in one shuffled order, the same for every rank."""
    root = Path(sysconfig.get_paths()["stdlib"])
    installed = {"site-packages", "dist-packages"}
    files = [
        path
        for path in sorted(root.rglob("*.py"))
        if path.is_file() and installed.isdisjoint(path.relative_to(root).parts)
    ]
    random.Random(0).shuffle(files)  # so that the validation part is like the training part
    return files


class Text:
    """Bytes in two parts, the last 5 % held out, and random windows out of either."""

    def __init__(self, data: bytes, length: int) -> None:
        self.length = length
        held_out = int(len(data) * VALIDATION_SHARE)
        if held_out <= length:
            raise ValueError(
                f"the text has {len(data)} bytes, so its held-out {VALIDATION_SHARE:.0%} has "
                f"{held_out}: sequences of {length} bytes need more than "
                f"{int(length / VALIDATION_SHARE)}; give a longer text or a smaller --seq-len"
            )
        tokens = torch.frombuffer(bytearray(data), dtype=torch.uint8)  # one byte each, whole text
        self.training, self.validation = tokens[:-held_out], tokens[-held_out:]

    def batches(
        self, part: Tensor, size: int, seed: int, device: torch.device
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield, for ever, windows of `part` and the same windows one byte later: 2 x [B, T]."""
        generator = torch.Generator().manual_seed(seed)
        offsets = torch.arange(self.length + 1)
        while True:
            starts = torch.randint(len(part) - self.length, (size, 1), generator=generator)
            windows = part[starts + offsets].long().to(device)  # [B, T + 1]
            yield windows[:, :-1], windows[:, 1:]
