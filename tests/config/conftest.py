"""The package's log lines, fresh for each test."""

import logging

import pytest

from deepspeed.common.logging import logger


@pytest.fixture
def log():
    """A list that fills with the logger's messages; what was warned about before is forgotten."""
    lines: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record):
            lines.append(record.getMessage())

    listener, level = Listener(), logger.level
    remembered = logger.__dict__.pop("_warned", set())
    logger.addHandler(listener)
    yield lines
    logger.removeHandler(listener)
    logger.setLevel(level)
    logger.__dict__["_warned"] = remembered
