"""The memory of tiles in flight: slots of one buffer."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rtp_wrap.policy import MIN_STAGING_BYTES
from rtp_wrap.transport import Staging

CPU = torch.device("cpu")
counts = pytest.mark.parametrize("count", [2, 3, 4])


@counts
@given(nbytes=st.integers(MIN_STAGING_BYTES, 100_000))
def test_slots_are_equal_aligned_and_as_large_as_fits(count: int, nbytes: int) -> None:
    staging = Staging(nbytes, CPU)
    slots = staging.slots(count)
    size = staging.slot_bytes(count)
    assert [slot.shape for slot in slots] == [(size,)] * count
    assert all(slot.dtype == torch.uint8 for slot in slots)
    assert size % Staging.ALIGNMENT == 0
    assert size * count <= nbytes < (size + Staging.ALIGNMENT) * count
    start = slots[0].data_ptr()
    assert [slot.data_ptr() - start for slot in slots] == [index * size for index in range(count)]


@counts
def test_slots_do_not_overlap(count: int) -> None:
    slots = Staging(5000, CPU).slots(count)
    for index, slot in enumerate(slots):
        slot.fill_(index)
    assert [slot.unique().tolist() for slot in slots] == [[index] for index in range(count)]


def test_all_cuts_are_of_one_buffer_allocated_once() -> None:
    staging = Staging(4096, CPU)
    cuts = [staging.slots(count) for count in (2, 3, 4)]
    storages = {slot.untyped_storage().data_ptr() for slot in itertools.chain(*cuts)}
    assert len(storages) == 1
    assert cuts[0][0].untyped_storage().nbytes() == 4096
    assert all(a is b for a, b in zip(cuts[0], staging.slots(2), strict=True))


@counts
def test_the_least_staging_has_room_for_elements_of_every_dtype(count: int) -> None:
    assert Staging(MIN_STAGING_BYTES, CPU).slot_bytes(count) >= torch.complex128.itemsize


def test_no_staging_is_no_memory() -> None:
    """For models without rotated layers."""
    assert all(slot.numel() == 0 for count in (2, 3, 4) for slot in Staging(0, CPU).slots(count))


def test_slots_first_taken_in_inference_mode_can_be_written_outside_it() -> None:
    staging = Staging(4096, CPU)
    with torch.inference_mode():
        slot = staging.slots(2)[0]
        slot.fill_(1)
    slot.fill_(2)
    assert slot.eq(2).all()
