"""What the tests of the compatibility table show is noted, and held against it at the end."""

from __future__ import annotations

import pytest
from compatibility import Outcomes

OUTCOMES = Outcomes()
LAST = "test_no_line_says_more_than_its_test_showed"


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    OUTCOMES.pytest_runtest_logreport(report)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.name == LAST)


@pytest.fixture
def outcomes() -> dict[str, set[str]]:
    """How the tests that ran before ended, by file::name."""
    return dict(OUTCOMES.of)
