"""The page of what works with which library is in step with the tests."""

from __future__ import annotations

import re
from importlib import metadata

import pytest
from compatibility import FAILS, NOT_RUN, OPTIONAL, PAGE, REFUSED, ROOT, TABLE, WORKS, page, shown, versions

ROWS = [(library, *row) for library, rows in TABLE.items() for row in rows]


def test_the_page_is_in_step_with_the_table():
    assert PAGE.read_text() == page(), "run: python tests/ecosystem/compatibility.py"


def test_libraries_are_those_that_the_tests_install():
    asked = versions()
    assert {library: metadata.version(library) for library in TABLE} == {name: asked[name] for name in TABLE}


@pytest.mark.parametrize(("library", "feature", "verdict", "held"), ROWS)
def test_a_line_names_the_test_that_holds_it(library, feature, verdict, held):
    path, _, name = held.partition("::")
    source = (ROOT / path).read_text()
    assert re.search(rf"^def {name}\(", source, re.MULTILINE), f"{library}: {feature}: no {held}"


@pytest.mark.parametrize(
    ("verdict", "ended", "said"),
    [
        (WORKS, {"passed"}, WORKS),
        (REFUSED, {"passed", "skipped"}, REFUSED),
        (WORKS, {"passed", "failed"}, FAILS),
        (WORKS, {"skipped"}, NOT_RUN),
        (WORKS, set(), NOT_RUN),
        (OPTIONAL, {"skipped"}, OPTIONAL),
        (OPTIONAL, {"failed"}, FAILS),
    ],
)
def test_a_line_says_what_its_test_showed(verdict, ended, said):
    assert shown(verdict, ended) == said


def test_the_page_follows_the_outcomes():
    held = {row[-1]: {"passed"} for row in ROWS}
    assert page(held) == page()
    last = ROWS[-1]
    assert f"| {last[1]} | {FAILS} |" in page({**held, last[-1]: {"failed"}})


def test_no_line_says_more_than_its_test_showed(outcomes):
    """Runs last: of the lines whose tests have run in this session."""
    wrong = {
        f"{library}: {feature}": shown(verdict, outcomes[held])
        for library, feature, verdict, held in ROWS
        if held in outcomes and shown(verdict, outcomes[held]) != verdict
    }
    assert wrong == {}, "docs/compatibility.md says more"
