"""``ds_ckpt list``: the checkpoints in a folder."""

from __future__ import annotations

import argparse
import json
import time
from datetime import datetime, timezone
from typing import Any

from rich.filesize import decimal

from deepspeed.checkpoint import folders
from deepspeed.checkpoint.tools.finding import Found, dtype_of, survey
from deepspeed.common import tables
from deepspeed.errors import CheckpointError

SPANS = (("days", 86400), ("h", 3600), ("min", 60), ("s", 1))


def run(asked: argparse.Namespace) -> int:
    """Run the command."""
    found = survey(asked.folder)
    if asked.json:
        print(json.dumps([as_record(one) for one in found], indent=1))
        return 0
    if not found:
        print(f"{asked.folder}: there is no checkpoint in it")
        return 0
    table = tables.new_table(str(asked.folder))
    for name in ("tag", "step", "state", "stage", "ranks", "dtype", "size", "age", ""):
        table.add_column(
            name, justify="right" if name in ("step", "stage", "ranks", "size", "age") else "left"
        )
    for one in found:
        table.add_row(*_cells(one), style="bold" if one.named else None)
    tables.show(table)
    for one in found:
        if one.problem:
            print(one.problem)
    try:
        folders.read_latest(asked.folder)
    except CheckpointError as error:
        print(error)
    return 0


def as_record(one: Found) -> dict[str, Any]:
    """Return what is known of a checkpoint as plain values."""
    about = {} if one.manifest is None else one.manifest.about
    return {
        "tag": one.tag,
        "folder": str(one.folder),
        "state": one.state,
        "latest": one.named,
        "step": one.step,
        "stage": about.get("stage"),
        "ranks": about.get("world_size"),
        "dtype": None if one.manifest is None else dtype_of(one.manifest),
        "bytes": one.nbytes,
        "written": datetime.fromtimestamp(one.written, timezone.utc).isoformat(timespec="seconds"),
        "problem": one.problem or None,
    }


def _cells(one: Found) -> list[str]:
    record = as_record(one)
    known = ["-" if record[key] is None else str(record[key]) for key in ("stage", "ranks", "dtype")]
    step = "-" if one.step is None else str(one.step)
    size, age = decimal(one.nbytes), in_words(time.time() - one.written)
    return [one.tag, step, one.state, *known, size, age, "latest" if one.named else ""]


def in_words(seconds: float) -> str:
    """Write a span of time in its largest unit."""
    unit, length = next((one for one in SPANS if seconds >= 2 * one[1]), SPANS[-1])
    return f"{max(seconds, 0) // length:.0f} {unit}"
