"""Where units that are released between uses leave what each rank holds of them.

device of the flat   offload_param      held
host                 none or cpu        in an arena, or in memory where ranks share none
another              none               beside the flat
another              cpu                in the host's memory
any                  nvme               the first units as with cpu, up to ``max_in_cpu``; the others on disk
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from deepspeed.comm.arena import Arena, arena_of
from deepspeed.comm.direct import is_on_host
from deepspeed.config.compilation import AioSection
from deepspeed.config.zero import OffloadParamSection
from deepspeed.errors import OffloadError
from deepspeed.offload.disk import Disk
from deepspeed.offload.tier import DiskTier, open_tier
from deepspeed.zero.held import Held, HeldInArena, HeldOnDisk, HeldOnHost, PeerFiles
from deepspeed.zero.stage import RankGroup, Sharding


@dataclass
class Holder:
    """Makes what units hold.

    Attributes:
        arena: memory that the ranks of the host read by themselves.
        on_host: whether what is in memory is not on the device of the flats.
        pin: whether that memory is page-locked.
        tier: on disk; None: everything stays in memory.
        peers: the tier's files of all ranks, where this rank sees them.
        room: elements that may still stay in memory.
    """

    arena: Arena | None = None
    on_host: bool = False
    pin: bool = False
    tier: DiskTier | None = None
    peers: PeerFiles | None = field(default=None, repr=False)
    room: int = 0

    def hold(self, rows: Tensor, sharding: Sharding, label: str) -> Held:
        """Take over this rank's chunks (spread ranks, chunk) of a flat; all ranks call it in the same order.

        Where parameters stay whole, what is held stays what is given.
        """
        if not sharding.releases:
            return Held(rows, sharding, label)
        if self.tier is not None:
            if rows.numel() > self.room:
                return HeldOnDisk(self.tier, self.peers, rows[0], sharding, label)
            self.room -= rows.numel()
        if self.on_host:
            return HeldOnHost(rows, sharding, label, pin=self.pin)
        if self.arena is not None:
            block = self.arena.block(rows.numel() * rows.element_size())
            return HeldInArena(block, rows, sharding, label)
        return Held(rows.clone(), sharding, label)


def is_apart_from_host(device: torch.device) -> bool:
    """Whether the device has memory of its own."""
    return device.type != "cpu"


def leave_device(section: OffloadParamSection | None, device: torch.device) -> bool:
    """Whether ``offload_param`` takes parameters off the device."""
    if section is None:
        return False
    return section.device == "nvme" or (section.device == "cpu" and is_apart_from_host(device))


def make_holder(
    sharding: Sharding, device: torch.device, section: OffloadParamSection | None, aio: AioSection
) -> Holder:
    """Make what holds the units of a sharding. All data-parallel ranks call it.

    Args:
        sharding: the groups of ranks.
        device: of the flats.
        section: ``offload_param``.
        aio: how to use the disk.

    Raises:
        OffloadError: any rank cannot use its folder.
    """
    if not sharding.releases:
        return Holder()
    near, everyone = sharding.hold_group, sharding.everyone
    holder = Holder()
    if not is_apart_from_host(device) and near.size > 1 and is_on_host(near.process_group):
        holder.arena = arena_of(near.process_group)
    if section is None or not leave_device(section, device):
        return holder
    holder.on_host, holder.pin = is_apart_from_host(device), section.pin_memory
    if section.device == "nvme":
        holder.room = section.max_in_cpu
        holder.tier = open_tier(
            str(section.nvme_path),
            Disk(aio.block_size, aio.queue_depth, aio.intra_op_parallelism),
            buffers=section.buffer_count,
            pin=section.pin_memory,
            rank=everyone.rank,
            group=everyone.process_group,
        )
        if near.size == 1 or holder.arena is not None:
            holder.peers = _open_peers(holder.tier, near)
    return holder


def _open_peers(tier: DiskTier, near: RankGroup) -> PeerFiles | None:
    """Open the files of all ranks of a host; None on all of them if one cannot open them all."""
    peers = PeerFiles(tier.file, near.rank)
    paths: list[str] = [str(tier.file.path.resolve())]
    if near.size > 1:
        paths = paths * near.size
        dist.all_gather_object(paths, paths[near.rank], group=near.process_group)
    with suppress(OffloadError):  # their folder may be another one here
        for path in paths:
            peers.open(path)
    found = [len(peers.files) == near.size]
    if near.size > 1:
        found = found * near.size
        dist.all_gather_object(found, found[near.rank], group=near.process_group)
    return peers if all(found) else None
