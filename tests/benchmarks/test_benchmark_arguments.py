"""What the benchmarks' command lines refuse, before anything is measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

Load = Callable[[str], ModuleType]

REFUSED = (
    ("comparison_options", ["--pairs", "0"], "--pairs: expected a whole number of at least 1, got '0'"),
    ("comparison_options", ["--steps", "few"], "--steps: expected a whole number of at least 1, got 'few'"),
    ("comparison_options", ["--warmup", "-1"], "--warmup: expected a whole number of at least 0, got '-1'"),
    ("comparison_options", ["--ranks", "0"], "--ranks: expected a whole number of at least 1"),
    ("comparison_options", ["--dim", "100"], "--dim: expected a multiple of --heads, which is 8, got 100"),
    ("comparison_options", ["--swap", "/nowhere"], "--swap: expected a folder, and there is none at"),
    ("comparison_options", ["--original-python", "/nowhere"], "--original-python: expected a program"),
    ("comparison_options", ["--original-python", "/etc"], "--original-python: expected a program"),
    ("comparison_options", ["--name", "../x"], "--name: expected a name without a folder, got '../x'; --out"),
    (
        "comparison_options",
        ["--out", "/etc/passwd"],
        "--out: expected a folder to write to, got '/etc/passwd'",
    ),
    ("comparison_options", ["--out", "/proc/x"], "--out: expected a folder to write to, got '/proc/x'"),
    ("comparison_options", ["--name", ".."], "--name: expected a name without a folder, got '..'; --out"),
    ("comparison_options", ["--rows", "ours:2,ddpp"], "--rows: row: expected one of ours:STAGE"),
    ("gpu", ["--rows", "ours:2,ours:7"], "--rows: row: expected ours:STAGE[:host][+compile] or original"),
    ("adam_step", ["--out", "/etc/passwd/x"], "--out: expected a folder to write to, got '/etc/passwd/x'"),
    ("suite", ["--index", "--out", "/nowhere"], "--out: expected the folder of the results, got /nowhere"),
    ("suite", ["--only", "step_bf61"], "--only: expected some of step_bf16, step_fp32"),
    ("scaling", ["--models", "7B,8B"], "--models: expected some of 7B, 70B, got '8B'"),
    ("scaling", ["--stages", "1,4"], "--stages: expected some of 0, 1, 2, 3, got '4'"),
    ("scaling", ["--ranks", "8,0"], "--ranks: expected a whole number of at least 1, got '0'"),
    ("gpu", ["--peak-tflops", "0"], "--peak-tflops: expected a number above 0, got '0'"),
    ("gpu", ["--heads", "3"], "--dim: expected a multiple of --heads, which is 3"),
    ("overhead", ["--stages", "-1"], "--stages: expected some of 0, 1, 2, 3"),
    ("kills", ["--most", "nan"], "--most: expected a number above 0, got 'nan'"),
    ("disk", ["--folder", "/nowhere"], "--folder: expected a folder"),
)


@pytest.mark.parametrize(("script", "given", "message"), REFUSED)
def test_what_cannot_be_measured_is_refused(
    load: Load, capsys: pytest.CaptureFixture[str], script: str, given: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        load(script).parse(given)

    assert message in capsys.readouterr().err


def test_lists_are_in_order_and_name_each_once(load: Load) -> None:
    given = load("scaling").parse(["--ranks", "64,8,64", "--stages", "3,1", "--models", "70B,7B,70B"])

    assert (given.ranks, given.stages, given.models) == ([8, 64], [1, 3], ["70B", "7B"])
    assert load("comparison_options").parse(["--rows", "ours:2,ddp,ours:2"]).rows == ("ours:2", "ddp")


def test_the_python_of_an_environment_stays_the_one_that_was_named(
    load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    python = tmp_path / "python"
    python.symlink_to("/bin/sh")
    monkeypatch.chdir(tmp_path)

    given = load("comparison_options").parse(["--original-python", "python"])

    assert given.original_python == python
