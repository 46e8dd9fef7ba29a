"""From the offload sections of a configuration to the places where states live."""

from __future__ import annotations

import torch

from deepspeed.comm.agreement import raise_together
from deepspeed.config import DeepSpeedConfig
from deepspeed.errors import OffloadError
from deepspeed.offload.disk import Disk
from deepspeed.offload.swap import SwapFolder
from deepspeed.offload.tier import DiskTier
from deepspeed.zero.stage import RankGroup
from deepspeed.zero.states import StateHome

HOST = torch.device("cpu")
IN_USE = 3
"""Buffers beside those that wait to be written or were read ahead: a leaf's states, its gradient, a landing."""


def home_of_states(
    settings: DeepSpeedConfig, data_parallel: RankGroup, device: torch.device
) -> StateHome | None:
    """Turn ``offload_optimizer`` into a place; None for the device itself. All ranks call it.

    Raises:
        OffloadError: any rank cannot use its folder.
    """
    section = settings.zero_optimization.offload_optimizer
    if section is None or section.device == "none":
        return None
    if section.device == "cpu":
        return StateHome(HOST, ratio=section.ratio) if is_apart_from_host(device) else None
    tier = disk_tier(
        settings,
        str(section.nvme_path),
        data_parallel,
        buffers=IN_USE + section.buffer_count,
        pin=section.pin_memory,
    )
    return StateHome(HOST, tier, ratio=section.ratio)


def is_apart_from_host(device: torch.device) -> bool:
    """Whether the device has memory of its own."""
    return device.type != "cpu"


def disk_tier(
    settings: DeepSpeedConfig, path: str, data_parallel: RankGroup, *, buffers: int, pin: bool
) -> DiskTier:
    """Make this rank's folder below `path`, and the threads that read and write there. All ranks call it.

    Raises:
        OffloadError: any rank cannot use its folder.
    """
    folder, error = None, None
    try:
        folder = SwapFolder(path, data_parallel.rank)
    except OffloadError as found:
        error = found
    raise_together(error, data_parallel.process_group)
    assert folder is not None
    aio = settings.aio
    disk = Disk(aio.block_size, aio.queue_depth, aio.intra_op_parallelism)
    return DiskTier(disk, folder, buffers=buffers, pin=pin)
