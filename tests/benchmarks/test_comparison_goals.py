"""What a comparison is held against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest

Load = Callable[[str], ModuleType]


def held(load: Load, work: Any, *rows: tuple[str, float, int], last_losses: Any = ()) -> dict[str, Any]:
    """Compare rows (name, seconds, MiB) in one round; return the verdicts by row and name."""
    table, ends = load("comparison_table"), dict(last_losses)
    turns = [
        table.Turn(
            row, 0, seconds, seconds, {}, mib << 20, mib << 20, 1.0, 9.0, ends.get(row, 8.0), None, 0.0
        )
        for row, seconds, mib in rows
    ]
    for turn in turns:
        turn.phases.update(forward=turn.total, backward=0.0, step=0.0)
    summaries = table.summarise(turns, 1024, load("rows").label)
    return {f"{v.row} {v.name}": v for v in load("comparison_goals").verdicts(summaries, work)}


def test_the_33m_model_in_bf16_on_two_ranks_has_the_goals_of_the_project(load: Load) -> None:
    work, goals, split_row = load("work").Work(), load("comparison_goals"), load("rows").split_row

    def speed(row: str, **changes: Any) -> float:
        goal: float = goals.speed_goal(split_row(row), replace(work, **changes))
        return goal

    assert [speed(f"ours:{stage}") for stage in range(4)] == [1.6, 1.75, 1.75, 1.95]
    assert [speed(f"ours:{stage}", accumulation=4) for stage in range(4)] == [1.6] * 4
    assert speed("ours:2:host") == speed("ours:3:disk") == speed("ours:3:all_disk") == 2.0
    assert {speed(f"ours:{stage}", ranks=4) for stage in range(4)} == {1.5}


@pytest.mark.parametrize(
    "changes", [{"precision": "fp32"}, {"checkpointing": True}, {"shape": "8M"}, {"shape": "120M"}], ids=str
)
def test_other_work_has_the_goals_it_always_had(load: Load, changes: dict[str, Any]) -> None:
    settings = load("suite_settings")
    shapes = {"8M": settings.EIGHT_MILLION, "120M": settings.HUNDRED_TWENTY_MILLION}
    if "shape" in changes:
        changes = {"shape": shapes[changes["shape"]]}
    work, split_row = replace(load("work").Work(), **changes), load("rows").split_row
    speed_goal = load("comparison_goals").speed_goal

    assert {speed_goal(split_row(f"ours:{stage}"), work) for stage in range(4)} == {1.3}
    assert speed_goal(split_row("ours:2:host"), work) == 1.5
    rows = [("ours:3", 1.0, 900), ("original:3", 2.0, 1000), ("fsdp2", 1.4, 1000), ("alone", 0.1, 500)]
    found = held(load, work, *rows)
    assert found["ours:3 x FSDP2"].goal == 1.3
    assert "ours:3 x limit" not in found


def test_a_row_is_held_against_the_original_the_limit_and_ddp(load: Load) -> None:
    rows = [("ours:0", 0.44, 910), ("original:0", 0.70, 1000), ("ddp", 0.50, 800), ("alone", 0.40, 700)]

    found = held(load, load("work").Work(), *rows)

    assert {name: verdict.met for name, verdict in found.items()} == {
        "ours:0 x original": False,
        "ours:0 memory": False,
        "ours:0 x limit": True,
        "ours:0 x DDP": True,
        "ours:0 loss": True,
    }
    assert found["ours:0 x original"].line == (
        "- this project, stage 0: 1.59 times as fast as the original (goal: at least 1.6, NOT met)."
    )
    assert found["ours:0 memory"].line == (
        "- this project, stage 0: 0.91 of the original's peak memory, 910 MiB beside 1000 MiB "
        "(goal: at most 0.9, NOT met)."
    )
    assert "1.10 times as long as one rank alone" in found["ours:0 x limit"].text


def test_stage_3_is_held_against_fsdp2_too(load: Load) -> None:
    runs = [("ours:3", 0.4, 890), ("original:3", 0.8, 1000), ("fsdp2", 0.6, 880), ("alone", 0.35, 500)]

    found = held(load, load("work").Work(), *runs)

    assert found["ours:3 x original"].met
    assert (found["ours:3 x FSDP2"].goal, found["ours:3 x FSDP2"].met) == (1.7, False)
    assert not found["ours:3 memory beside FSDP2"].met
    assert (found["ours:3 x limit"].goal, found["ours:3 x limit"].met) == (1.15, True)


def test_offload_is_held_against_the_original_with_it_and_on_the_host_against_none(load: Load) -> None:
    runs = [("ours:2", 0.40, 9), ("ours:2:host", 0.41, 8), ("original:2:host", 0.80, 10), ("alone", 0.3, 5)]

    found = held(load, load("work").Work(), *runs)

    assert found["ours:2:host x original"].text.endswith("1.95 times as fast as the original")
    assert not found["ours:2:host x original"].met
    assert found["ours:2:host x without offload"].met
    assert "ours:2:host x limit" not in found
    assert "ours:2 x original" not in found


def test_a_row_that_learns_otherwise_is_shown(load: Load) -> None:
    runs = [("ours:0", 0.5, 9), ("ours:1", 0.5, 9), ("ddp", 0.5, 9)]

    found = held(load, load("work").Work(), *runs, last_losses={"ours:1": 8.2})

    assert not found["ours:1 loss"].met
    assert "0.200 of DDP's fall in loss" in found["ours:1 loss"].text
