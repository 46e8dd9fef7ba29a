"""What leaves for the disk leaves the process too."""

from __future__ import annotations

from pathlib import Path

import torch

from deepspeed.accelerator.memory import resident_bytes
from deepspeed.offload.disk import Disk
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
