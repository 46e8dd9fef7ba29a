"""Optimizers and numerics."""

from __future__ import annotations

import importlib
from typing import Any

from deepspeed.common.lazy import lazy_names

MODULES = ("adagrad", "adam", "aio", "lamb", "lion", "muon", "op_builder")

_find = lazy_names(__name__, {"__compatible_ops__": "deepspeed.offload.aio:COMPATIBLE_OPS"})


def __getattr__(name: str) -> Any:
    return importlib.import_module(f"{__name__}.{name}") if name in MODULES else _find(name)
