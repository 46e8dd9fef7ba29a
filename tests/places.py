"""Places for states that this machine does not have."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

import deepspeed.engine.offload
import deepspeed.zero.holder


@contextmanager
def host_apart() -> Iterator[None]:
    """The host as a place of its own, as it is beside a GPU: ``cpu:0`` is another device than ``cpu`` by name."""
    module = deepspeed.engine.offload
    before = module.HOST, module.is_apart_from_host
    module.HOST, module.is_apart_from_host = torch.device("cpu", 0), lambda device: True
    try:
        yield
    finally:
        module.HOST, module.is_apart_from_host = before


@contextmanager
def parameters_apart() -> Iterator[None]:
    """``offload_param`` of ``cpu`` as a move to another memory, as it is beside a GPU."""
    module = deepspeed.zero.holder
    before = module.is_apart_from_host
    module.is_apart_from_host = lambda device: True
    try:
        yield
    finally:
        module.is_apart_from_host = before
