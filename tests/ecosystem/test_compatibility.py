"""The page of what works with which library is in step with the tests."""

from __future__ import annotations

import re

import pytest
from compatibility import PAGE, ROOT, TABLE, page, versions

ROWS = [(library, *row) for library, rows in TABLE.items() for row in rows]


def test_the_page_is_in_step_with_the_table():
    assert PAGE.read_text() == page(), "run: python tests/ecosystem/compatibility.py"


def test_libraries_are_those_that_the_tests_install():
    assert {*TABLE} <= {*versions()}


@pytest.mark.parametrize(("library", "feature", "verdict", "held"), ROWS)
def test_a_line_names_the_test_that_holds_it(library, feature, verdict, held):
    path, _, name = held.partition("::")
    source = (ROOT / path).read_text()
    assert re.search(rf"^def {name}\(", source, re.MULTILINE), f"{library}: {feature}: no {held}"
