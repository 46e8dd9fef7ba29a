"""What an engine adds is divided into what a step, a parameter and a unit cost."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def test_costs_are_those_that_the_times_were_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    overhead = importlib.import_module("overhead")

    def run(layers: int, together: int) -> dict[str, dict[str, list[float]]]:
        bare = 70.0 + 20 * 2 * layers
        added = 50.0 + 3 * 2 * layers + 40 * (layers // together if together else 1)
        return {"seconds": {"bare": [bare], "engine": [bare + added]}}

    found = overhead.costs({name: [run(*sizes)] for name, sizes in overhead.SHAPES.items()})

    assert found["a step"] == pytest.approx((50, 70))
    assert found["a parameter"] == pytest.approx((3, 20))
    assert found["a unit"] == pytest.approx((40, 0))
