"""Errors that one rank has and all must raise: a rank that stops alone leaves the others waiting."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from deepspeed import comm
from deepspeed.accelerator import get_accelerator
from deepspeed.errors import DeepSpeedError


def raise_together(error: DeepSpeedError | None, group: Any, label: str = "") -> None:
    """Raise on every rank of `group` if any of them has an error; a collective.

    Ranks that have none raise the first one of the others, with its rank. `label` says what the ranks agree on.
    """
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        if error is not None:
            raise error
        return
    flag = torch.tensor(float(error is not None), device=get_accelerator().current_device_name())
    comm.all_reduce(flag, group=group, label=label)
    if float(flag) == 0:
        return
    texts: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(texts, None if error is None else (type(error), str(error)), group=group)
    if error is not None:
        raise error
    rank, (kind, text) = next((rank, found) for rank, found in enumerate(texts) if found is not None)
    raise kind(f"rank {rank}: {text}")
