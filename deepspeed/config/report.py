"""The effective configuration as a table: each value, where it came from, and what to know about it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deepspeed.config.base import Section, shown
from deepspeed.config.inert import STAGE_3_ONLY
from deepspeed.config.root import DeepSpeedConfig
from deepspeed.config.tree import join
from deepspeed.config.unbuilt import TABLE, asked

if TYPE_CHECKING:
    from rich.table import Table

ALWAYS = (
    "zero_optimization",
    "fp16",
    "bf16",
    "torch_autocast",
    "data_types",
    "comms_logger",
    "tensorboard",
    "wandb",
    "csv_monitor",
    "comet",
    "timers",
    "checkpoint",
)
"""Sections shown key by key even when nothing in them was given."""

SECRETS = ("comet.api_key",)
HIDDEN = "(hidden)"


@dataclass(frozen=True)
class Row:
    """One line of the table; `value` as in JSON."""

    path: str
    value: str
    source: str
    note: str = ""


def rows(config: DeepSpeedConfig) -> list[Row]:
    """Return the effective configuration; a section nobody touched and that is off is one row."""
    notes = {row.path: f"not built yet: {row.feature}" for row in asked(config)}
    stage = int(config.zero_optimization.stage)
    return [_annotated(row, notes, stage) for row in _rows(config, config, "")]


def _rows(config: DeepSpeedConfig, section: Section, path: str) -> Iterator[Row]:
    for name in type(section).model_fields:
        value, here = getattr(section, name), join(path, name)
        if isinstance(value, Section) and not path and not _touched(config, name) and name not in ALWAYS:
            yield Row(here, "{...}", "default", "nothing given, off")
        else:
            yield from _value_rows(config, value, here)


def _value_rows(config: DeepSpeedConfig, value: Any, here: str) -> Iterator[Row]:
    if isinstance(value, Section):
        yield from _rows(config, value, here)
        return
    waiting = [path for path in config.unresolved() if path.startswith(f"{here}.")]
    if isinstance(value, dict) and (value or waiting):
        for name, inner in value.items():
            yield from _value_rows(config, inner, join(here, name))
        yield from (Row(path, '"auto"', "auto") for path in waiting)
        return
    pending = here in config.unresolved()
    told = '"auto"' if pending else HIDDEN if here in SECRETS and value else shown(value)
    yield Row(here, told, config.source_of(here))


def _touched(config: DeepSpeedConfig, name: str) -> bool:
    return config.source_of(name) != "default"


def _annotated(row: Row, notes: dict[str, str], stage: int) -> Row:
    note = row.note
    if row.path in notes:
        note = notes[row.path]
    elif row.value == '"auto"' and row.source == "auto":
        note = "waits for model and data"
    elif row.source != "default" and stage < 3 and row.path.startswith(STAGE_3_ONLY):
        note = "no effect below stage 3"
    elif row.source != "default":
        note = _idle(row.path, notes)
    return Row(row.path, row.value, row.source, note)


def _idle(path: str, asked_for: Collection[str]) -> str:
    """Say for which feature a key waits, when nothing asks for that feature."""
    owners = [one for one in TABLE if one.governs(path)]
    if not owners or any(one.path in asked_for for one in owners):
        return ""
    return f"no effect without {owners[0].feature}"


def render_config(config: DeepSpeedConfig) -> Table:
    """Return the effective configuration as a rich table, for ``ds_report --config``.

    Load it with ``refuse_unbuilt=False`` to see what is refused instead of an error.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(
        title="effective configuration",
        caption=f"data-parallel ranks: {config.batch.dp}",
        box=SIMPLE_HEAD,
    )
    table.add_column("key", no_wrap=True)
    table.add_column("value", overflow="fold")
    table.add_column("source")
    group = ""
    for row in rows(config):
        section, _, name = row.path.partition(".")
        if name and section != group:
            table.add_row(section, style="bold")
        group = section if name else ""
        told = f"{row.source}; {row.note}" if row.note else row.source
        style = "red" if "not built" in row.note else "dim" if row.source == "default" else None
        table.add_row(f"  {name}" if name else section, row.value, told, style=style)
    return table
