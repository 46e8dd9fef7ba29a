"""The rows and sizes with which offload is measured."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest

Load = Callable[[str], ModuleType]


def test_a_row_names_its_tier(load: Load) -> None:
    rows = load("rows")

    assert rows.split_row("ours:3:disk") == rows.Row("ours", 3, "disk")
    assert rows.split_row("original:2:host") == rows.Row("original", 2, "host")
    assert rows.split_row("ours:1") == rows.Row("ours", 1, "")
    assert rows.split_row("ddp") == rows.Row("ddp", 0, "")
    assert rows.label("ours:3:all_disk") == "this project, stage 3, optimizer and parameters on disk"


@pytest.mark.parametrize(
    "row", ["ours", "ours:4", "ours:3:tape", "ours:2:disk", "ours:3:disk:x", "ddp:1", "x"]
)
def test_a_row_that_is_none_is_refused(load: Load, row: str) -> None:
    with pytest.raises(ValueError, match=f"got '{row}'"):
        load("rows").split_row(row)


def test_both_engines_get_the_same_tier_and_the_original_its_best_settings_beside(load: Load) -> None:
    sections = load("tiers").offload_sections

    ours, original = (sections(kind, "all_disk", "/swap", 1000) for kind in ("ours", "original"))

    assert ours["offload_optimizer"] == {"device": "nvme", "nvme_path": "/swap"}
    assert ours["offload_param"] == {"device": "nvme", "nvme_path": "/swap", "max_in_cpu": 0}
    for name in ("offload_optimizer", "offload_param"):
        assert original[name].items() > ours[name].items()
    assert sections("ours", "host", "/swap", 1000) == {"offload_optimizer": {"device": "cpu"}}
    assert sections("ours", "", "/swap", 1000) == {}


def test_memory_is_measured_at_the_sizes_that_were_asked_for(load: Load) -> None:
    memory, model = load("offload_memory"), load("model")

    for millions in (100, 300, 600):
        shape = memory.shape_of(millions)
        assert model.count_parameters(shape) / 1e6 == pytest.approx(millions, rel=0.07)
        assert shape.dim == memory.WIDTH.dim


def test_memory_is_held_against_that_without_offload_and_against_a_smaller_model(load: Load) -> None:
    memory = load("offload_memory")
    small, middle = memory.shape_of(100), memory.shape_of(300)

    def run(shape: object, tier: str, besides: int) -> object:
        weights = memory.Run(shape, tier, [{"peak": 0}] * 2).weights
        return memory.Run(shape, tier, [{"peak": weights + besides}, {"peak": 1}])

    runs = [run(small, "disk", 100), run(middle, "", 10**10), run(middle, "disk", 120)]
    (half, is_half), (flat, is_flat) = memory.verdicts(runs)

    assert is_half
    assert "goal: at most 0.5, met" in half
    assert not is_flat
    assert "1.20 (goal: at most 1.1, NOT met)" in flat
