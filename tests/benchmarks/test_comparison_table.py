"""The comparison's table says what the figures say."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module under test; benchmarks are scripts, so their folder joins the path for a moment."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("comparison_table")


def rank(
    step: float, peak: int = 1 << 30, last_loss: float = 8.0, gathers: float | None = None, disk: float = 0.0
) -> dict[str, Any]:
    phases = {"forward": [step / 4] * 3, "backward": [step / 2] * 3, "step": [step / 4] * 3}
    return {
        "seconds": {**phases, "total": [step] * 3, "cpu": [step] * 3},
        "losses": [9.0, last_loss],
        "first_step": 1.0,
        "gathers": gathers,
        "disk": disk,
        "peak": peak,
        "peak_training": peak,
    }


def test_a_step_lasts_as_long_as_on_its_slowest_rank(table: ModuleType) -> None:
    turn = table.make_turn("ddp", 0, [rank(0.4, peak=1), rank(0.5, peak=2)])

    assert (turn.total, turn.peak, turn.first_loss, turn.last_loss) == (0.5, 2, 9.0, 8.0)
    assert turn.phases == {"forward": 0.125, "backward": 0.25, "step": 0.125}


def test_ratios_are_taken_within_a_round(table: ModuleType) -> None:
    # The machine is three times as slow in the second round; the ratio of a pair does not care.
    turns = [
        table.make_turn(row, number, [rank(seconds * slow)])
        for number, slow in enumerate((1.0, 3.0))
        for row, seconds in (("ours:1", 0.4), ("original:1", 0.6), ("ddp", 0.5))
    ]

    ours, original, ddp = table.summarise(turns, 1024, str)

    assert ours.against_original == pytest.approx(1.5)
    assert ours.against_ddp == pytest.approx(1.25)
    assert original.against_original is None
    assert (ddp.total, ddp.fastest, ddp.slowest) == pytest.approx((1.0, 0.5, 1.5))
    assert ddp.tokens_per_second == pytest.approx(1024)


def test_the_limit_is_a_row_like_others_and_memory_is_a_part_of_the_original_s(table: ModuleType) -> None:
    # Again the second round is slower, and it takes more memory.
    turns = [
        table.make_turn(row, number, [rank(seconds * slow, peak=int(mib * slow) << 20)])
        for number, slow in enumerate((1.0, 2.0))
        for row, seconds, mib in (
            ("ours:2", 0.44, 450),
            ("original:2", 0.7, 500),
            ("alone", 0.4, 300),
            ("compute", 0.2, 200),
        )
    ]

    ours, original, alone, _ = table.summarise(turns, 1024, str)
    titles, _, first, *_ = (
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in table.render_table([ours, original, alone]).splitlines()
    )

    assert (ours.over_alone, ours.over_compute, ours.share) == pytest.approx((1.1, 2.2, 0.9))
    assert (original.over_alone, original.share) == (pytest.approx(1.75), None)
    assert alone.over_alone == 1
    assert first[titles.index("x limit")] == "1.10"
    assert first[titles.index("x compute")] == "2.20"
    assert first[titles.index("of original")] == "0.90"


def test_the_table_has_a_line_for_every_row(table: ModuleType) -> None:
    turns = [table.make_turn(row, 0, [rank(0.4)]) for row in ("ours:2", "original:2", "ddp")]

    lines = table.render_table(table.summarise(turns, 1024, str)).splitlines()

    assert len({len(line) for line in lines}) == 1
    assert [line.split()[1] for line in lines[2:]] == ["ours:2", "original:2", "ddp"]


def test_the_table_shows_the_columns_in_which_a_row_has_a_figure(table: ModuleType) -> None:
    turns = [
        table.make_turn("ours:3", 0, [rank(0.4, gathers=18.0), rank(0.4, gathers=22.0)]),
        table.make_turn("fsdp2", 0, [rank(0.5)]),
    ]

    titles, _, ours, fsdp2 = (
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in table.render_table(table.summarise(turns, 1024, str)).splitlines()
    )

    assert "x DDP" not in titles
    assert "x original" not in titles
    assert (ours[titles.index("gathers")], fsdp2[titles.index("gathers")]) == ("22", "-")
    assert ours[titles.index("x FSDP2")] == "1.25"


def test_what_goes_to_the_disk_is_shown(table: ModuleType) -> None:
    turns = [table.make_turn("ours:3:disk", 0, [rank(0.4, disk=3 << 20), rank(0.4, disk=5 << 20)])]

    titles, _, ours = (
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in table.render_table(table.summarise(turns, 1024, str)).splitlines()
    )

    assert ours[titles.index("disk MiB")] == "5"
