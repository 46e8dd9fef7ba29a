"""From the offload sections of a configuration to tiers."""

from __future__ import annotations

from deepspeed.comm.agreement import raise_together
from deepspeed.config import DeepSpeedConfig
from deepspeed.errors import OffloadError
from deepspeed.offload.disk import Disk
from deepspeed.offload.swap import SwapFolder
from deepspeed.offload.tier import DiskTier
from deepspeed.zero.stage import RankGroup


def disk_for_optimizer(settings: DeepSpeedConfig, data_parallel: RankGroup) -> DiskTier | None:
    """Make the tier of ``offload_optimizer``; None where states stay in memory. All ranks call it.

    Raises:
        OffloadError: any rank cannot use its folder.
    """
    section = settings.zero_optimization.offload_optimizer
    if section is None or section.device != "nvme":
        return None
    return _tier(settings, str(section.nvme_path), section.buffer_count, section.pin_memory, data_parallel)


def _tier(
    settings: DeepSpeedConfig, path: str, buffers: int, pin: bool, data_parallel: RankGroup
) -> DiskTier:
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
