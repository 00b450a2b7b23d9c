"""The memory that tiles in flight live in: fixed, shared by all sites, allocated once."""

from __future__ import annotations

import torch


class Staging:
    """``nbytes`` of memory on ``device``, cut into two, three or four equal slots at a time.

    One rotation at a time uses it. A forward needs two slots (a tile in use and one arriving); a
    backward four (the same for accumulators), or three where hops take turns.
    """

    #: Slots start on this boundary (bytes), as the allocator's own blocks do.
    ALIGNMENT = 256

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.nbytes = nbytes
        buffer = torch.empty(nbytes, dtype=torch.uint8, device=device)
        # Cut now: views made under inference_mode could not be written to outside it.
        self._slots = {
            count: tuple(buffer.narrow(0, index * size, size) for index in range(count))
            for count in (2, 3, 4)
            for size in [self.slot_size(nbytes, count)]
        }

    @classmethod
    def slot_size(cls, nbytes: int, count: int) -> int:
        """The size of each of ``count`` slots of a staging of ``nbytes``."""
        return nbytes // count // cls.ALIGNMENT * cls.ALIGNMENT

    @classmethod
    def size_for(cls, tile_bytes: int) -> int:
        """The least staging in which tiles of ``tile_bytes`` are never cut."""
        return 4 * (-(-tile_bytes // cls.ALIGNMENT) * cls.ALIGNMENT)

    def slot_bytes(self, count: int) -> int:
        """The size of each of ``count`` slots."""
        return self.slot_size(self.nbytes, count)

    def slots(self, count: int) -> tuple[torch.Tensor, ...]:
        """``count`` (2, 3 or 4) one-dimensional uint8 tensors that do not overlap."""
        return self._slots[count]
