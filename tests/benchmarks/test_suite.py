"""The suite measures every setting, goes on where it stopped, and puts all of it on one page."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

Load = Callable[[str], ModuleType]


@pytest.fixture
def runs(load: Load, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Replace ranks by figures: (setting, row) of every run; pictures are not drawn."""
    compare, ran = load("compare"), []

    def run_row(options: Any, row: str, worker: str) -> list[dict[str, Any]]:
        ran.append((options.name, row))
        if options.name == "size_8m" and row == "fsdp2":
            raise load("launch").RunFailed("rank 0 ended\nout of luck")
        step = {"ours": 0.4, "original": 0.9}.get(row.partition(":")[0], 0.38)
        spans = {"forward": [step / 2], "backward": [step / 4], "step": [step / 4]}
        return [
            {
                "seconds": {**spans, "total": [step], "cpu": [step]},
                "losses": [9.0, 8.0],
                "first_step": 1.0,
                "gathers": None,
                "disk": 0,
                "peak": 1 << 30,
                "peak_training": 1 << 30,
                "versions": {"torch": "2"},
            }
        ]

    monkeypatch.setattr(compare, "run_row", run_row)
    monkeypatch.setattr(compare, "draw", lambda *arguments: None)
    return ran


def test_settings_cover_stages_precisions_accumulation_ranks_and_sizes(load: Load) -> None:
    settings = {setting.name: setting for setting in load("suite_settings").SETTINGS}
    millions = {
        name: load("model").count_parameters(setting.work.shape) / 1e6 for name, setting in settings.items()
    }

    for precision in ("bf16", "fp32"):
        for suffix, accumulation in (("", 1), ("_acc4", 4)):
            work = settings[f"step_{precision}{suffix}"].work
            assert (work.precision, work.accumulation, work.ranks) == (precision, accumulation, 2)
    for setting in settings.values():
        assert {"ddp", "fsdp2", "alone", "compute"} < set(setting.rows)
        for row in setting.rows:
            load("rows").split_row(row)
            if row.startswith("original"):
                assert row.replace("original", "ours") in setting.rows
    assert settings["ranks4"].work.ranks == 4
    assert settings["checkpointing"].work.checkpointing
    assert {row.split(":")[2] for row in settings["offload"].rows if row.count(":") == 2} == {
        "host",
        "disk",
        "all_disk",
    }
    assert millions["step_bf16"] == pytest.approx(33.7, abs=0.1)
    assert millions["size_8m"] == pytest.approx(8, abs=0.3)
    assert millions["size_120m"] == pytest.approx(120, abs=1)


def test_every_script_of_the_suite_takes_what_it_is_given(load: Load, tmp_path: Path) -> None:
    suite = load("suite")
    asked = ["--quick", "--pairs", "4", "--note", "slow", "--original-python", sys.executable]
    given = suite.parse([*asked, "--out", str(tmp_path), "--swap", str(tmp_path)])
    for single in load("suite_settings").SINGLES:
        taken = load(single.name).parse(suite.script_arguments(single, given))

        assert (getattr(taken, single.rounds[2:]), taken.out) == (4, tmp_path)
        assert taken.note.endswith("slow")


def test_a_suite_goes_on_where_it_stopped(load: Load, runs: list[tuple[str, str]], tmp_path: Path) -> None:
    suite = load("suite")

    def run(*arguments: str) -> int:
        runs.clear()
        names = "checkpointing"
        assert suite.run(suite.parse(["--only", names, "--out", str(tmp_path), *arguments])) == []
        return len(runs)

    assert run("--pairs", "2") == 2 * 6
    assert run("--pairs", "2") == 0
    assert run("--pairs", "3") == 6
    assert run("--pairs", "2", "--again") == 2 * 6
    assert run("--pairs", "2", "--note", "on another day") == 2 * 6


def test_rows_of_the_same_work_start_alike_in_processes_of_their_own(load: Load, tmp_path: Path) -> None:
    model, work = load("model"), load("work")
    shape = model.Shape(layers=1, dim=16, heads=2, seq=4, vocab=11, batch=2)
    options = load("comparison_options").Options(
        work=work.Work(shape=shape, precision="fp32", accumulation=2), steps=2, warmup=1, swap=tmp_path
    )
    run_row = load("compare").run_row

    ours = run_row(options, "ours:2", "worker.py")
    compute = run_row(options, "compute", "profile_worker.py")

    (batch, other), (mine, theirs) = model.batches(shape, 0, 2), model.batches(shape, 1, 2)
    first = sum(model.build_model(shape)(*each).item() for each in (batch, other, mine, theirs)) / 4
    assert [rank["losses"][0] for rank in ours] == pytest.approx([first] * 2, abs=1e-5)
    for rank in compute:
        lines = load("profile_kinds").by_line(rank)
        assert lines["matrix multiplications"]["forward"] > 0
        assert rank["calls"]["backward"]["aten::mm"] >= 1
        assert rank["faults"] >= 0


def test_figures_of_other_sources_or_another_machine_are_measured_anew(load: Load) -> None:
    is_current, head = load("suite").is_current, load("results").header()
    busier = {**head, "machine": {**head["machine"], "load_before": 99.0}, "date": "then"}

    assert is_current(busier, head)
    assert not is_current({}, head)
    assert not is_current({**head, "source": "another"}, head)
    assert not is_current({**head, "machine": {**head["machine"], "cores": 1000}}, head)


def test_a_failed_row_is_reported_and_the_rest_goes_on(
    load: Load, runs: list[tuple[str, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = load("suite")
    given = suite.parse(["--only", "size_8m,size_120m", "--pairs", "2", "--out", str(tmp_path)])

    failed = suite.run(given)
    page = (tmp_path / "index.md").read_text()

    assert failed == ["size_8m"]
    assert runs.count(("size_8m", "fsdp2")) == 1
    assert runs.count(("size_120m", "fsdp2")) == 2
    assert "**torch FSDP2 failed:** out of luck" in page
    assert "[1/2] size_8m: failed: fsdp2" in capsys.readouterr().err
    runs.clear()
    assert suite.run(given) == ["size_8m"]
    assert {name for name, _ in runs} == {"size_8m"}


def test_a_setting_that_stops_short_stops_no_other(
    load: Load, runs: list[tuple[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = load("suite")

    def stop(*arguments: object) -> str:
        raise OSError("no disk")

    monkeypatch.setattr(suite, "run_script", stop)
    given = suite.parse(["--only", "overhead,checkpointing", "--pairs", "1", "--out", str(tmp_path)])

    assert suite.run(given) == ["overhead"]
    assert "Not measured yet: step_bf16" in (tmp_path / "index.md").read_text()


def test_the_overview_has_a_line_for_every_stage_made_from_the_figures(
    load: Load, runs: list[tuple[str, str]], tmp_path: Path
) -> None:
    suite, index = load("suite"), load("comparison_index")
    suite.run(suite.parse(["--only", "step_bf16", "--pairs", "1", "--out", str(tmp_path)]))
    head = {"date": "today", "machine": load("meter").machine(), "note": "", "versions": {"torch": "2"}}
    (tmp_path / "overhead.json").write_text(json.dumps({**head, "verdicts": ["- Stage 0: fast (met)."]}))
    (tmp_path / "profile_ours_2.md").write_text("# Where a step goes: this project\n\nFar.\n")
    (tmp_path / "index.md").unlink()

    page = index.write_index(tmp_path).read_text()
    titles, _, *rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line[:1] == "|"
    ]

    assert [row[:2] for row in rows] == [["33M, bf16", f"stage {stage}"] for stage in range(4)]
    first = dict(zip(titles[2:-1], rows[1][2:-1], strict=True))
    assert (first["ours ms"], first["original ms"], first["limit ms"]) == ("400", "900", "380")
    assert (first["x original"], first["x limit"], first["of original"]) == ("2.25", "1.05", "1.00")
    assert first["goals"] == "x original >= 1.75, memory <= 0.9, x limit <= 1.12"
    assert rows[1][-1] == "NOT met: memory"
    assert "- Stage 0: fast (met)." in page
    assert "[step_bf16](step_bf16.md): 33M, bf16. Rounds: 1. Measured" in page
    assert "- Where a step goes: this project: [profile_ours_2](profile_ours_2.md)" in page
    assert "checkpoints" in page.splitlines()[-1]


@pytest.mark.parametrize("content", [b"{bad", b"[1]", b"\xff\xfe\x00"])
def test_a_damaged_file_of_figures_is_named(load: Load, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "adam_step.json").write_bytes(content)

    with pytest.raises(SystemExit, match=r"adam_step\.json: expected a JSON object, but .* measure anew"):
        load("comparison_index").write_index(tmp_path)


def test_figures_of_other_work_are_not_in_the_overview(load: Load, tmp_path: Path) -> None:
    other = asdict(load("work").Work(ranks=3))
    (tmp_path / "step_bf16.json").write_text(json.dumps({"turns": [], "work": other}))
    (tmp_path / "offload.json").write_text(json.dumps({"turns": []}))

    page = load("comparison_index").write_index(tmp_path).read_text()

    assert "Not measured yet: step_bf16" in page
    assert "offload" in page.splitlines()[-1]


def test_a_setting_changes_only_its_name_work_rows_and_steps(load: Load) -> None:
    setting = load("suite_settings").SETTINGS[-1]
    base = load("comparison_options").Options(pairs=7, note="here")

    options = setting.options(base)

    same = replace(options, work=base.work, rows=base.rows, name=base.name)
    assert replace(same, steps=base.steps, warmup=base.warmup) == base
    assert asdict(options.work) == asdict(setting.work)
    assert (options.steps, options.warmup) == (setting.steps, setting.warmup) < (base.steps, base.warmup)
    assert setting.options(replace(base, steps=1)).steps == 1
