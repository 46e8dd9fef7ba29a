"""Walks over sections: the caller's tree is read against them, and their keys are listed.

Reading does by hand what pydantic does not: it keeps where each value came from, sets "auto" aside,
maps other spellings, and says which key an unknown one resembles.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from deepspeed.config.base import Section, shown
from deepspeed.config.legacy import old_names
from deepspeed.config.names import did_you_mean, nearest, resembling

AUTO = "auto"
Kind = Literal["section", "map", "list", "free", "leaf"]


@dataclass
class Findings:
    """What one walk over the caller's tree found, by path."""

    user: list[str] = field(default_factory=list)
    auto: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    strangers: list[str] = field(default_factory=list)
    spelled: dict[str, str] = field(default_factory=dict)


def join(path: str, name: object) -> str:
    """Return ``path.name``, or ``name`` at the top."""
    return f"{path}.{name}" if path else str(name)


def shape(annotation: Any) -> tuple[Kind, type[Section] | None]:
    """Say what stands under a key: a section, a map or list of sections, free keys, or a leaf."""
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return next((found for found in map(shape, inside) if found[0] != "leaf"), ("leaf", None))
    if origin is Annotated:
        return shape(inside[0])
    if origin is dict:
        kind, section = shape(inside[1])
        return ("map", section) if kind == "section" else ("free", None)
    if origin is list and shape(inside[0])[0] == "section":
        return "list", shape(inside[0])[1]
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "section", annotation
    return "leaf", None


def keys(section: type[Section], path: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield the path and declaration of every leaf key; ``<name>`` and ``[]`` stand for the user's own."""
    for name, declared in section.model_fields.items():
        here = join(path, name)
        kind, inner = shape(declared.annotation)
        if inner is None:
            yield here, declared
        else:
            yield from keys(inner, here + {"map": ".<name>", "list": "[]"}.get(kind, ""))


def read(section: type[Section], tree: Mapping[Any, Any], found: Findings, path: str = "") -> dict[str, Any]:
    """Return the part of `tree` that pydantic is to validate, under canonical names; fill `found`."""
    taken: dict[str, Any] = {}
    for written, value in tree.items():
        name = section.aliases.get(written, written)
        declared = section.model_fields.get(name) if isinstance(name, str) else None
        here = join(path, name)
        if declared is None:
            _unknown(section, path, str(written), found)
        elif here in found.user or here in found.auto:
            found.errors.append(f"{join(path, written)}: expected once, got it as {name} too; remove one")
        else:
            if written != name:
                found.spelled[here] = join(path, written)
            _take(taken, name, declared, value, found, here)
    return taken


def _take(
    taken: dict[str, Any], name: str, declared: FieldInfo, value: Any, found: Findings, here: str
) -> None:
    kind, section = shape(declared.annotation)
    if value == AUTO and isinstance(value, str) and kind in ("leaf", "free") and declared.default != AUTO:
        found.auto.append(here)
        return
    found.user.append(here)
    if kind == "section" and section and isinstance(value, Mapping):
        value = read(section, value, found, here)
    elif kind == "map" and section and isinstance(value, Mapping):
        value = {
            name: read(section, inner, found, join(here, name)) if isinstance(inner, Mapping) else inner
            for name, inner in value.items()
        }
    elif kind == "list" and section and isinstance(value, list):
        value = [
            read(section, inner, found, f"{here}[{i}]") if isinstance(inner, Mapping) else inner
            for i, inner in enumerate(value)
        ]
    elif kind == "free" and isinstance(value, Mapping):
        value = _read_free(value, found, here)
    taken[name] = value


def _read_free(tree: Mapping[Any, Any], found: Findings, path: str) -> dict[Any, Any]:
    """Return a dict of free keys without those whose value is "auto"."""
    kept = {}
    for name, value in tree.items():
        here = join(path, name)
        if isinstance(value, str) and value == AUTO:
            found.auto.append(here)
        else:
            found.user.append(here)
            kept[name] = value
    return kept


def _unknown(section: type[Section], path: str, written: str, found: Findings) -> None:
    known = [*section.model_fields, *section.aliases, *old_names(path)]
    if not path:
        alike = resembling(written, known)
        if not alike:
            found.strangers.append(written)
            return
    elif section.open_ended:
        return
    else:
        alike = nearest(written, known)
    found.errors.append(
        f"{join(path, written)}: expected a known key, got {shown(written)}; {did_you_mean(alike)}"
    )


def lookup(config: Section, path: str) -> Any:
    """Return the value at `path`, or None where a section on the way is absent."""
    value: Any = config
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else getattr(value, name, None)
    return value
