"""The generators that a rank draws from, as plain data and back."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from deepspeed.accelerator import get_accelerator
from deepspeed.activation_checkpointing.checkpointing import get_cuda_rng_tracker


def random_states() -> dict[str, Any]:
    """Return the state of Python's, NumPy's and torch's generators, the device's and its named streams."""
    accelerator = get_accelerator()
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state(),
        "device": None if accelerator.on_host else accelerator.get_rng_state(),
        "streams": get_cuda_rng_tracker().get_states(),
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Put all generators into the states that `random_states` returned."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"].clone())
    if states["device"] is not None and not get_accelerator().on_host:
        get_accelerator().set_rng_state(states["device"].clone())
    if states["streams"]:
        get_cuda_rng_tracker().set_states({name: state.clone() for name, state in states["streams"].items()})
