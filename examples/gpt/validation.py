"""Scoring of text that was not trained on, shared out over the ranks."""

from __future__ import annotations

import numpy as np
import torch

from deepspeed import DeepSpeedEngine, comm
from gpt.pace import BITS
from gpt.ranks import gather_row

AT_ONCE = 32  # windows in one forward


def validate(engine: DeepSpeedEngine, windows: np.ndarray) -> float:
    """Return the bits per byte of `windows` (count, seq + 1); every rank must call it."""
    engine.eval()
    nats = weight = 0.0
    for start in range(0, len(windows), AT_ONCE * comm.get_world_size()):
        first = start + AT_ONCE * comm.get_rank()
        mine = windows[first : first + AT_ONCE]
        count = len(mine)
        if count == 0:
            mine = windows[:1]  # forward may be collective, so a rank with nothing left runs one uncounted
        text = torch.from_numpy(mine).long()
        with torch.no_grad():
            nats += count * float(engine(text[:, :-1], text[:, 1:]))
        weight += count
    engine.train()
    total, count_of_all = gather_row([nats, weight], engine.device).sum(dim=0).tolist()
    return float(total / count_of_all * BITS)
