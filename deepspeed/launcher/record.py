"""What a rank leaves behind about its end, in the file where torch's elastic agent looks for it.

The outer shape of the JSON is the agent's; the agent hands it on to whoever asks why a rank failed.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

VARIABLE = "TORCHELASTIC_ERROR_FILE"
OWN = "deepspeed"


class Record(NamedTuple):
    """A rank's end."""

    time: float
    """Seconds since the epoch: when the script failed, or else when the process ended."""
    summary: str = ""
    """One line: the exception, or the text given to sys.exit."""
    text: str = ""
    """The traceback, or the last lines of its output."""
    code: int | None = None
    """The exit code the script asked for; None when it did not come to that."""
    signal: int = 0
    """The signal that ended the process, or 0."""
    peak: int = 0
    """Bytes of its peak resident memory."""
    ended: bool = False
    """Whether it was told to end before."""
    log: str = ""
    """The file that has its output, if it has one of its own."""


def write(record: Record) -> None:
    """Write this rank's record; does nothing in a process that the launcher did not start."""
    path = os.environ.get(VARIABLE)
    if not path:
        return
    message = {
        "message": record.summary,
        "extraInfo": {"py_callstack": record.text, "timestamp": str(int(record.time))},
    }
    beside = Path(f"{path}.new")
    beside.write_text(json.dumps({"message": message, OWN: record._asdict()}))
    beside.replace(path)


def read() -> Record | None:
    """Return this rank's record, if it wrote one."""
    path = Path(os.environ.get(VARIABLE, os.devnull))
    return parse(json.loads(path.read_text())) if path.is_file() else None


def parse(data: dict[str, Any]) -> Record | None:
    """Return the record in the file's JSON, or None where another program wrote it."""
    return Record(**data[OWN]) if OWN in data else None


def now(summary: str = "", text: str = "", code: int | None = None) -> Record:
    """Return a record of something that happened this moment."""
    return Record(time.time(), summary, text, code)
