"""From the offload sections of a configuration to the places where states live."""

from __future__ import annotations

import torch

from deepspeed.config import DeepSpeedConfig
from deepspeed.offload.disk import Disk
from deepspeed.offload.tier import open_tier
from deepspeed.zero.holder import is_apart_from_host
from deepspeed.zero.stage import RankGroup
from deepspeed.zero.states import StateHome

HOST = torch.device("cpu")
IN_USE = 1
"""Buffers beside those that wait to be written or were read ahead: that of the leaf that is updated."""


def home_of_states(
    settings: DeepSpeedConfig, data_parallel: RankGroup, device: torch.device
) -> StateHome | None:
    """Turn ``offload_optimizer`` into a place; None for the device itself. All ranks call it.

    Raises:
        OffloadError: any rank cannot use its folder.
    """
    section, aio = settings.zero_optimization.offload_optimizer, settings.aio
    if section is None or section.device == "none":
        return None
    if section.device == "cpu":
        return StateHome(HOST, ratio=section.ratio) if is_apart_from_host(device) else None
    tier = open_tier(
        str(section.nvme_path),
        Disk(aio.block_size, aio.queue_depth, aio.intra_op_parallelism),
        buffers=IN_USE + section.buffer_count,
        pin=section.pin_memory,
        rank=data_parallel.rank,
        group=data_parallel.process_group,
    )
    return StateHome(HOST, tier, ratio=section.ratio)
