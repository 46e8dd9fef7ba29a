"""What leaves for the disk leaves the process too, and what a buffer still has is not read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deepspeed.accelerator.memory import resident_bytes
from deepspeed.errors import OffloadError
from deepspeed.offload.buffers import aligned_size
from deepspeed.offload.disk import Disk, Pending
from deepspeed.offload.files import DataFile
from deepspeed.offload.swap import SwapFolder
from deepspeed.offload.tier import DiskTier, Parcel

MIB = 2**20


def test_tensors_that_leave_give_their_memory_to_the_system(tmp_path: Path) -> None:
    tier = DiskTier(Disk(), SwapFolder(tmp_path), buffers=2)
    torch.ones(4 * MIB)  # freeing it makes the C library keep blocks of this size in the heap from now on
    before, kept = resident_bytes(), []
    for _ in range(40):
        states = [torch.ones(2 * MIB) for _ in range(2)]
        kept.append([torch.ones(size) for size in (16, 64, 1024)])  # small ones that stay, cut from any hole
        tier.put(Parcel(), states)
    grown = resident_bytes() - before
    tier.close()

    assert grown < 160 * MIB  # of the 640 MiB that left


class CountingDisk(Disk):
    """A disk that counts what is read."""

    reads = 0

    def read(self, file: DataFile, offset: int, buffer: Tensor) -> Pending:
        self.reads += 1
        return super().read(file, offset, buffer)


@pytest.fixture
def tier(tmp_path: Path) -> Iterator[DiskTier]:
    tier = DiskTier(CountingDisk(), SwapFolder(tmp_path), buffers=3)
    yield tier
    tier.close()


def put_away(tier: DiskTier, count: int) -> list[Parcel]:
    parcels = [Parcel() for _ in range(count)]
    for number, parcel in enumerate(parcels):
        tier.put(parcel, [torch.full((5000,), float(number))])
    return parcels


def add_one(tier: DiskTier, parcels: Sequence[Parcel]) -> int:
    """Change every parcel in turn; return how many were read."""
    before = tier.disk.reads
    for index, parcel in enumerate(parcels):
        with tier.holding(parcel, changed=True):
            for after in parcels[index + 1 : index + 2]:
                tier.prefetch(after)
            parcel.tensors[0] += 1
    return tier.disk.reads - before


def test_a_round_that_begins_where_the_last_one_ended_reads_less(tier: DiskTier) -> None:
    parcels = put_away(tier, 6)
    rounds = [parcels, parcels[::-1], parcels, parcels[::-1]]

    assert all(add_one(tier, parcels) <= 4 for parcels in rounds[1:])
    for number, parcel in enumerate(parcels):
        with tier.holding(parcel, changed=False):
            assert parcel.tensors[0].eq(number + 3).all()
    assert tier.nbytes == 3 * aligned_size(20_000)


def test_the_same_way_round_reads_everything_and_stays_right(tier: DiskTier) -> None:
    parcels = put_away(tier, 6)

    assert [add_one(tier, parcels) for _ in range(3)] == [6, 6, 6]
    for number, parcel in enumerate(parcels):
        with tier.holding(parcel, changed=False):
            assert parcel.tensors[0].eq(number + 3).all()


def test_contents_that_are_replaced_or_dropped_are_not_remembered(tier: DiskTier) -> None:
    first, second = put_away(tier, 2)
    tier.put(first, [torch.full((5000,), 7.0)])
    tier.drop(second)
    tier.put(second, [torch.full((100,), 8.0)])
    for parcel, value in ((first, 7), (second, 8)):
        with tier.holding(parcel, changed=False):
            assert parcel.tensors[0].eq(value).all()


def test_what_could_not_be_written_is_not_read_either(
    tier: DiskTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: object) -> Pending:
        failed: Future[int] = Future()
        failed.set_exception(OffloadError("no room"))
        return Pending(0, [failed])

    first, second = put_away(tier, 2)
    with monkeypatch.context() as patch:
        patch.setattr(CountingDisk, "write", lost)
        with tier.holding(first, changed=True):
            first.tensors[0].fill_(7.0)

    for parcel in (first, first, second):  # the file has what the first one was before
        with pytest.raises(OffloadError, match="no room"):
            tier.fetch(parcel)
    assert str(tier.failure) == "no room"


def test_buffers_of_parcels_of_another_size_do_not_push_out_what_is_remembered(tier: DiskTier) -> None:
    parcels = put_away(tier, 2)
    small = tier.beside(2)
    put_away(small, 9)

    assert add_one(tier, parcels) == 0
    with small.noting_failure():
        raise OffloadError("no room")
    assert str(tier.failure) == "no room"
