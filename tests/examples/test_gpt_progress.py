"""What training shows while it runs."""

from __future__ import annotations

import io

import gpt_example  # noqa: F401
from gpt.progress import LineProgress, LiveProgress, Progress, Status, minutes, progress_for
from rich.console import Console


def status(step: int, ranks: int = 2) -> Status:
    return Status(
        step=step,
        steps=100,
        loss=1.5,
        bits=2.16,
        lr=4e-3,
        grad_norm=0.5,
        tokens_per_s=12345.6,
        memory=(400e6,) * ranks,
        seconds_left=83.4,
        last=step == 100,
    )


def test_lines_say_everything_and_are_about_twenty(capsys):
    with LineProgress() as progress:
        for step in range(1, 101):
            progress.show(status(step))
    lines = capsys.readouterr().out.splitlines()
    assert 20 <= len(lines) <= 22
    assert lines[-1] == (
        "step 100/100  loss 1.500  bits/byte 2.16  lr 4.0e-03  grad norm 0.50  tokens/s 12,346  "
        "MB per rank 400 400  left 1:23"
    )


def test_a_terminal_gets_a_table_that_fits_it():
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100, height=20, color_system=None)
    with LiveProgress(console) as progress:
        progress.show(status(40))
    for text in ("40/100", "1.500", "4.0e-03", "0.50", "12,346", "400 400", "1:23"):
        assert text in screen.getvalue()


def test_many_ranks_are_not_all_listed():
    assert status(1, ranks=64).cells()["MB per rank"].endswith("400 ...")


def test_only_rank_0_talks():
    assert type(progress_for(1)) is Progress
    assert isinstance(progress_for(0), LineProgress)  # the output of a test is no terminal


def test_durations():
    assert [minutes(each) for each in (0, 59.6, 61)] == ["0:00", "1:00", "1:01"]
