"""The base of every configuration section: strict keys, lenient numbers, errors in our own words.

A section is a pydantic model whose attributes are the JSON keys. What a key accepts stands in its type:
`Size` is an integer of at least 0 and takes ``1e9``, ``0.94e6`` and ``"5"``; the same object that converts
the value also says what was expected, in the error and in the documentation.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, ValidationError
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from deepspeed.errors import ConfigError

DTYPE_NAMES = {
    "fp16": "fp16",
    "float16": "fp16",
    "half": "fp16",
    "bf16": "bf16",
    "bfloat16": "bf16",
    "fp32": "fp32",
    "float32": "fp32",
    "float": "fp32",
}


@dataclass(frozen=True)
class Expects:
    """In an annotation: the values a key takes, in words, and the conversion that refuses the others.

    `convert` raises ValueError, TypeError or OverflowError for a value it refuses.
    """

    text: str
    convert: Callable[[Any], Any]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self._apply, handler(source))

    def _apply(self, value: Any) -> Any:
        try:
            return self.convert(value)
        except (ValueError, TypeError, OverflowError):
            raise PydanticCustomError("expects", "{text}", {"text": self.text}) from None


def to_number(value: Any) -> float:
    """Return a finite float; refuse true and false, which Python counts as numbers."""
    if isinstance(value, bool):
        raise TypeError
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return number


def to_integer(value: Any) -> int:
    """Return an int from 5, 5.0, 1e9 or "1e9"; refuse fractions."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    number = to_number(value)
    if number != int(number):
        raise ValueError
    return int(number)


def _at_least(low: float, convert: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def bounded(value: Any) -> Any:
        number = convert(value)
        if number < low:
            raise ValueError
        return number

    return bounded


def _positive(value: Any) -> float:
    number = to_number(value)
    if number <= 0:
        raise ValueError
    return number


def _fraction(value: Any) -> float:
    number = to_number(value)
    if not 0.0 <= number <= 1.0:
        raise ValueError
    return number


def _interval(value: Any) -> int | None:
    if value is None or value == math.inf:
        return None
    return _at_least(0, to_integer)(value) or None


def _dtype(value: Any) -> str:
    name = str(value).lower().removeprefix("torch.")
    if name not in DTYPE_NAMES:
        raise ValueError
    return DTYPE_NAMES[name]


def _integer_or_auto(value: Any) -> int | str:
    return "auto" if value == "auto" else to_integer(value)


def _number_or_auto(value: Any) -> float | str:
    return "auto" if value == "auto" else to_number(value)


def _names(value: Any) -> list[str]:
    names = [value] if isinstance(value, str) else list(value)
    if not all(isinstance(name, str) for name in names):
        raise TypeError
    return names


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def _upper(value: Any) -> Any:
    return value.upper() if isinstance(value, str) else value


LOWER = Expects("one of the names, in any case", _lower)
UPPER = Expects("one of the names, in any case", _upper)

Integer = Annotated[int, Expects("an integer", to_integer)]
Size = Annotated[int, Expects("an integer of at least 0", _at_least(0, to_integer))]
Count = Annotated[int, Expects("an integer of at least 1", _at_least(1, to_integer))]
Number = Annotated[float, Expects("a number", to_number)]
Amount = Annotated[float, Expects("a number of at least 0", _at_least(0, to_number))]
Factor = Annotated[float, Expects("a number above 0", _positive)]
Fraction = Annotated[float, Expects("a number from 0 to 1", _fraction)]
Interval = Annotated[int | None, Expects("an integer of at least 0, infinity or null", _interval)]
IntegerOrAuto = Annotated[int | str, Expects('an integer or "auto"', _integer_or_auto)]
NumberOrAuto = Annotated[float | str, Expects('a number or "auto"', _number_or_auto)]
FilePath = Annotated[str, Expects("a path", os.fspath)]
Names = Annotated[list[str], Expects("a name or a list of names", _names)]
DtypeName = Annotated[Literal["fp16", "bf16", "fp32"], Expects('"fp16", "bf16" or "fp32"', _dtype)]


def key(default: Any, text: str) -> Any:
    """Declare one key: its default and one line for the documentation."""
    return Field(default, description=text)


def part(section: type[Section], text: str) -> Any:
    """Declare a sub-section that is always there, with its own defaults."""
    return Field(default_factory=section, description=text)


class Section(BaseModel):
    """One object of the configuration; attributes are the JSON keys.

    Built by `deepspeed.config.load_config`. Setting an attribute validates it and raises ConfigError.
    """

    model_config = ConfigDict(
        extra="forbid", validate_assignment=True, defer_build=True, protected_namespaces=()
    )
    aliases: ClassVar[Mapping[str, str]] = {}
    """Other accepted spelling -> key."""
    open_ended: ClassVar[bool] = False
    """Whether keys that are not listed are accepted and left alone."""

    def __setattr__(self, name: str, value: Any) -> None:
        try:
            super().__setattr__(name, value)
        except ValidationError as error:
            raise ConfigError("\n".join(explain(error))) from None


def shown(value: Any) -> str:
    """Return `value` as it would stand in a JSON file, cut to one short line."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def path_of(location: tuple[int | str, ...]) -> str:
    """Return ``a.b[0].c`` for the location ``("a", "b", 0, "c")``."""
    path = ""
    for step in location:
        path += f"[{step}]" if isinstance(step, int) else f".{step}" if path else step
    return path


def respell(path: str, spelled: Mapping[str, str]) -> str:
    """Return `path` as the user wrote it; `spelled` maps a path, or what it begins with, to that."""
    begin = path
    while begin and begin not in spelled:
        begin = begin.rpartition(".")[0]
    return spelled[begin] + path[len(begin) :] if begin else path


_EXPECTED = {
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "a string",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
}


def explain(error: ValidationError, spelled: Mapping[str, str] | None = None) -> list[str]:
    """Translate a pydantic error into lines of ``path: expected X, got Y``.

    `spelled` maps a path to the one the user wrote.
    """
    lines = []
    for found in error.errors(include_url=False):
        kind, where = found["type"], path_of(found["loc"])
        where = respell(where, spelled or {})
        if kind == "missing":
            lines.append(f"{where}: expected a value, this key is required")
            continue
        if kind == "literal_error":
            expected = found["ctx"]["expected"].replace("'", '"')
        else:
            expected = _EXPECTED.get(kind, found["msg"])
        lines.append(f"{where}: expected {expected}, got {shown(found['input'])}")
    return lines
