"""Every test starts with checkpointing as a fresh process has it."""

import pytest
from layers import log_lines, unconfigured


@pytest.fixture(autouse=True)
def _fresh():
    with unconfigured():
        yield


@pytest.fixture
def log():
    """A list that fills with the logger's messages."""
    with log_lines() as lines:
        yield lines
