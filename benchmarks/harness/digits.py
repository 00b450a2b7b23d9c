"""Handwritten digits: MNIST from its four files, else scikit-learn's smaller set. No download.

Everywhere n images are [n, 28, 28] bytes, and their labels [n] whole numbers below 10.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

SIZE = 28
#: MNIST's own, of pixels between 0 and 1.
MEAN, DEVIATION = 0.1307, 0.3081
#: How many of scikit-learn's 1797 images are held out.
HELD_OUT = 297

_UNSIGNED_BYTE = 0x08


@dataclass(frozen=True)
class Part:
    """Images and their labels."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Normalised images [B, 1, 28, 28] and labels [B] of ``indices`` [B], on ``device``."""
        pixels = self.images[indices].to(device).unsqueeze(1) / 255
        return (pixels - MEAN) / DEVIATION, self.labels[indices].to(device)


@dataclass(frozen=True)
class Digits:
    """What to learn from and what to be tested on."""

    name: str
    train: Part
    test: Part


def load(folder: Path | None) -> Digits:
    """MNIST of ``folder``, or scikit-learn's digits.

    Raises ``OSError`` for files that cannot be read and ``ValueError`` for those that are not
    MNIST's, or if there is neither a folder nor scikit-learn.
    """
    if folder is None:
        return _scikit_learns()
    train, test = _mnist_part(folder, "train"), _mnist_part(folder, "t10k")
    return Digits(f"MNIST of {folder}", train, test)


def read_idx(file: Path, dims: int) -> Tensor:
    """The unsigned bytes of an IDX file of ``dims`` dimensions, or of ``file``.gz.

    The format is two zero bytes, the type, the number of dimensions, each of them as four bytes
    (most significant first), then the elements; see http://yann.lecun.com/exdb/mnist.

    Raises ``FileNotFoundError`` if there is neither file, ``ValueError`` for other contents.
    """
    data = _contents(file)
    header = 4 + 4 * dims
    magic = bytes((0, 0, _UNSIGNED_BYTE, dims))
    if data[:4] != magic:
        raise ValueError(
            f"{file} begins with {data[:4].hex() or 'nothing'}, not with {magic.hex()}, the magic "
            f"number of unsigned bytes in {dims} dimension(s): it is another file of MNIST or none"
        )
    if len(data) < header:
        raise ValueError(f"{file} ends within its header, after {len(data)} bytes: copy it again")
    shape = struct.unpack(f">{dims}I", data[4:header])
    if len(data) - header != math.prod(shape):
        raise ValueError(
            f"{file} has {len(data) - header} bytes after its header, which announces "
            f"{' x '.join(map(str, shape))} = {math.prod(shape)}: copy it again"
        )
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)[header:].view(shape)


def shuffled(
    count: int, size: int, *, rank: int, ranks: int, seed: int, epoch: int
) -> list[Tensor]:
    """One rank's batches of indices for training: equally many, equally long ones on all ranks.

    As torch's ``DistributedSampler`` does it, a few indices come twice if ``count`` does not
    divide by ``ranks``.
    """
    generator = torch.Generator().manual_seed(seed + epoch)
    order = torch.randperm(count, generator=generator)
    places = torch.arange(rank, math.ceil(count / ranks) * ranks, ranks)
    return list(order[places % count].split(size))


def in_order(count: int, size: int, *, rank: int, ranks: int) -> list[Tensor]:
    """One rank's batches of indices for a test: equally many on all ranks, each index once.

    No batch is longer than ``size``; lengths differ by one at most, so one may be empty.
    """
    batches = math.ceil(math.ceil(count / ranks) / size)
    return list(torch.arange(count)[rank::ranks].tensor_split(batches))


def _mnist_part(folder: Path, prefix: str) -> Part:
    images = read_idx(folder / f"{prefix}-images-idx3-ubyte", dims=3)
    labels = read_idx(folder / f"{prefix}-labels-idx1-ubyte", dims=1).long()
    if len(images) == 0 or images.shape[1:] != (SIZE, SIZE):
        raise ValueError(
            f"{prefix}-images of {folder} has {len(images)} images of "
            f"{images.shape[1]} x {images.shape[2]}; MNIST's are {SIZE} x {SIZE}"
        )
    if len(images) != len(labels):
        raise ValueError(
            f"{prefix}-images of {folder} has {len(images)} images, but {prefix}-labels "
            f"{len(labels)} labels: take both from one copy of MNIST"
        )
    if labels.max() > 9:
        raise ValueError(f"{prefix}-labels of {folder} has a label {labels.max()}, above 9")
    return Part(images, labels)


def _contents(file: Path) -> bytes:
    """Of ``file``, or else what ``file``.gz is when unpacked."""
    packed = file.with_name(f"{file.name}.gz")
    if file.exists():
        return file.read_bytes()
    if not packed.exists():
        raise FileNotFoundError(
            f"{file.parent} has neither {file.name} nor {packed.name}: --data-dir is a folder with "
            f"the four files of MNIST; without it scikit-learn's digits are used"
        )
    try:
        return gzip.decompress(packed.read_bytes())
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{packed} cannot be unpacked ({error}): copy it again") from error


def _scikit_learns() -> Digits:
    """1797 images of 8 x 8 pixels from 0 to 16, enlarged; always the same ones are held out."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError(
            "scikit-learn, whose digits stand in for MNIST, is not installed: pip install "
            "scikit-learn, or give --data-dir a folder with the four files of MNIST"
        ) from error
    small, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    pixels = small.float().view(-1, 1, 8, 8) * (255 / 16)
    large = F.interpolate(pixels, (SIZE, SIZE), mode="bilinear").squeeze(1).round().byte()
    order = torch.randperm(len(large), generator=torch.Generator().manual_seed(0))
    test, train = order[:HELD_OUT], order[HELD_OUT:]
    parts = (Part(large[chosen], labels[chosen].long()) for chosen in (train, test))
    return Digits("scikit-learn's digits", *parts)
