"""Optimizers and numerics."""

from __future__ import annotations

import importlib
from types import ModuleType

MODULES = ("adagrad", "adam", "lamb", "lion", "muon")


def __getattr__(name: str) -> ModuleType:
    if name in MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
