"""The table of all keys for the documentation, generated from the sections.

``python -m deepspeed.config.reference docs/configuration.md`` writes it into that page, after its marker.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from deepspeed.config.base import LOWER, UPPER, Expects, Section, shown
from deepspeed.config.inert import INERT
from deepspeed.config.legacy import OFFLOADS, RENAMED
from deepspeed.config.root import DeepSpeedConfig
from deepspeed.config.tree import keys, shape

MARKER = "<!-- The tables below are generated: python -m deepspeed.config.reference docs/configuration.md -->"


def accepted(declared: FieldInfo) -> str:
    """Say in words which values a key takes."""
    for mark in declared.metadata:
        if isinstance(mark, Expects) and mark not in (LOWER, UPPER):
            return mark.text
    return _words(declared.annotation)


def _words(annotation: Any) -> str:
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join("null" if one is type(None) else _words(one) for one in inside)
    if origin is Annotated:
        marks = [mark.text for mark in inside[1:] if isinstance(mark, Expects) and mark not in (LOWER, UPPER)]
        return marks[0] if marks else _words(inside[0])
    if origin is Literal:
        return ", ".join(map(shown, inside))
    if origin is list:
        return "list"
    if origin is dict:
        return "object"
    return {bool: "true, false", str: "string", int: "an integer", float: "a number"}.get(annotation, "any")


def default(declared: FieldInfo) -> str:
    """Return a key's default as it would stand in JSON."""
    value = declared.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "required"
    if value == sys.maxsize:
        return "unlimited"
    return shown(value).replace("|", "\\|")


def key_tables() -> str:
    """Return one markdown table for the top-level keys and one for each section."""
    parts = [_table("Top level", DeepSpeedConfig, "")]
    for name, declared in DeepSpeedConfig.model_fields.items():
        _, section = shape(declared.annotation)
        if section is not None:
            parts.append(_table(f"`{name}`", section, name))
    parts += [_inert(), _old_names()]
    return "\n".join(parts)


def _table(title: str, section: type[Section], path: str) -> str:
    lines = [f"## {title}", ""]
    if path and section.__doc__:
        lines += [section.__doc__.splitlines()[0], ""]
    lines += ["| key | values | default | meaning |", "|---|---|---|---|"]
    for here, declared in keys(section):
        if not path and "." in here.replace("..", "."):
            continue
        row = (f"`{here}`", accepted(declared).replace("|", "\\|"), f"`{default(declared)}`")
        lines.append(f"| {' | '.join(row)} | {declared.description} |")
    if section.aliases:
        named = ", ".join(f"`{old}` for `{new}`" for old, new in section.aliases.items())
        lines += ["", f"Also accepted: {named}."]
    return "\n".join([*lines, ""])


def _old_names() -> str:
    lines = ["## Old names", "", "Each is reported once.", "", "| key | what becomes of it |", "|---|---|"]
    lines += [f"| `{old}` | read as `{new}` |" for old, new in RENAMED.items()]
    for old, new in OFFLOADS.items():
        lines.append(f'| `zero_optimization.{old}` | read as `{new}: {{"device": "cpu"}}` |')
    lines.append("| `zero_optimization: true` | read as `stage: 1` |")
    return "\n".join([*lines, ""])


def _inert() -> str:
    lines = ["## Without effect", "", "Another value than the default is reported once.", ""]
    lines += ["| key | why |", "|---|---|", *(f"| `{path}` | {reason} |" for path, reason in INERT.items())]
    return "\n".join([*lines, ""])


def with_tables(page: str) -> str:
    """Return `page` with everything after its marker replaced by the tables of today."""
    return f"{page.partition(MARKER)[0]}{MARKER}\n\n{key_tables()}"


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.write_text(with_tables(target.read_text(encoding="utf-8")), encoding="utf-8")
