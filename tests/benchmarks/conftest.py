"""Benchmarks are scripts in a folder that no test can import from."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Import a benchmark's module; their folder joins the path for the test."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module
