"""The machine's device as one object, and the one that the process uses.

    Accelerator = Devices   which devices there are, names, what they can compute
                + Memory    how much is used, pinned memory
                + Streams   streams, events, graphs, ranges in a profile
                + Random    seeds and generator states
                + Tensors   constructors by dtype, under the old class names

Nothing here touches the device before `get_accelerator` is called.
"""

from __future__ import annotations

import os

import torch

from deepspeed.accelerator.memory import Memory
from deepspeed.accelerator.random import Random
from deepspeed.accelerator.streams import Streams
from deepspeed.accelerator.tensors import Tensors
from deepspeed.errors import ConfigError


class Accelerator(Memory, Streams, Random, Tensors):
    """Torch's devices of one kind (``cpu``, ``cuda``, ``xpu``, ``mps``, ...) under one set of names."""


class _Chosen:
    accelerator: Accelerator | None = None


def get_accelerator() -> Accelerator:
    """Return the process's accelerator: DS_ACCELERATOR's kind, else what torch finds, else the CPU."""
    if _Chosen.accelerator is None:
        _Chosen.accelerator = Accelerator(_kind())
    return _Chosen.accelerator


def set_accelerator(accelerator: Accelerator) -> None:
    """Make `accelerator` the one that `get_accelerator` returns."""
    _Chosen.accelerator = accelerator


def is_current_accelerator_supported() -> bool:
    """Tell whether the chosen device is there and usable."""
    return get_accelerator().is_available()


def _kind() -> str:
    asked = os.environ.get("DS_ACCELERATOR", "").strip().lower()
    if asked == "cpu":
        return "cpu"
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    kind = found.type if found is not None else "cpu"
    if asked and asked != kind:
        raise ConfigError(
            f"DS_ACCELERATOR: expected cpu or {kind}, which this torch can use here, got {asked!r}"
        )
    return kind
