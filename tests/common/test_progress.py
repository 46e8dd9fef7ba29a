"""A bar appears on a terminal, and only for what takes long."""

from io import StringIO

from rich.console import Console

from deepspeed.common.progress import ByteBar


def drawn(seconds, *, terminal=True, **options):
    """Return what is drawn while 40 bytes are counted, 10 at each of these times."""
    screen, times = StringIO(), iter([0.0, *seconds])
    console = Console(file=screen, force_terminal=terminal, width=100)
    with ByteBar("saving it", 40, console=console, clock=lambda: next(times), **options) as bar:
        for _ in range(4):
            bar.advance(10)
    assert bar.done == 40
    return screen.getvalue()


def test_what_is_quick_shows_nothing():
    assert drawn([0.1, 1, 2, 2.9]) == ""


def test_what_is_slow_shows_a_bar_and_removes_it():
    screen = drawn([1, 2, 4])
    assert "saving it" in screen
    assert "40/40 bytes" in screen
    assert screen.endswith("\x1b[1A\x1b[2K")


def test_patience_is_a_choice():
    assert "10/40 bytes" in drawn([0.5], patience=0)


def test_there_is_no_bar_in_a_file_and_on_other_ranks():
    assert drawn([5] * 4, terminal=False) == ""
    assert drawn([5] * 4, shown=False) == ""


def test_more_bytes_than_expected_are_counted():
    screen = StringIO()
    console = Console(file=screen, force_terminal=True, width=100)
    with ByteBar("loading", 10, console=console, patience=0) as bar:
        bar.advance(8)
        bar.advance(8)
    assert "16/16 bytes" in screen.getvalue()


def test_no_bar_is_possible_where_stderr_is_no_terminal(capsys):
    with ByteBar("loading", 10, patience=0) as bar:
        bar.advance(10)
    assert capsys.readouterr().err == ""
