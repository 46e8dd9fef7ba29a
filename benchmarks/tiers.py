"""Where the states of a row are between uses: `ours:3:disk` is stage 3 with the optimizer's on disk.

host        master weights and optimizer states in host memory, where the update runs
disk        the same on disk
all_disk    these and the parameters on disk, none of them kept in memory (stage 3)

Both engines get the same sections. The original gets, beside them, what it needs to run this model with its reads
and writes overlapping the update; this project runs on its defaults.
"""

from __future__ import annotations

from typing import Any

TIERS = {
    "host": "optimizer in host memory",
    "disk": "optimizer on disk",
    "all_disk": "optimizer and parameters on disk",
}

# Below stage 3 the original does not use the disk, although it takes the setting.
STAGES = {"host": (1, 2, 3), "disk": (3,), "all_disk": (3,)}

# Its reads and writes overlap the update only if asked to; it then needs the buffers of two groups of states at once,
# and a group's fit in one buffer.
_ORIGINAL_OPTIMIZER = {"buffer_count": 16, "pipeline_read": True, "pipeline_write": True}
_ORIGINAL_SUB_GROUP = 4_000_000
_ORIGINAL_BUFFERS = 60  # one for each parameter it has under way


def offload_sections(kind: str, tier: str, folder: str, largest: int) -> dict[str, Any]:
    """Write what `zero_optimization` needs for a tier.

    Args:
        kind: of the row.
        tier: of TIERS, or nothing.
        folder: where swap files may lie.
        largest: elements of the largest parameter, for which the original's buffers must have room.
    """
    if not tier:
        return {}
    if tier == "host":
        return {"offload_optimizer": {"device": "cpu"}}
    sections: dict[str, Any] = {"offload_optimizer": {"device": "nvme", "nvme_path": folder}}
    if tier == "all_disk":
        sections["offload_param"] = {"device": "nvme", "nvme_path": folder, "max_in_cpu": 0}
    if kind == "original":
        sections["offload_optimizer"] |= _ORIGINAL_OPTIMIZER
        sections["sub_group_size"] = _ORIGINAL_SUB_GROUP
        if "offload_param" in sections:
            # It stops when it reads a parameter ahead that it has a buffer for already.
            sections["stage3_prefetch_bucket_size"] = 0
            sections["offload_param"] |= {"buffer_size": largest, "buffer_count": _ORIGINAL_BUFFERS}
    return sections
