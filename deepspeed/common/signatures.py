"""Check keyword arguments from a configuration against a constructor, before it is called.

A wrong name or type is then an error about the key the user wrote, not one from inside a class.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from numbers import Real
from typing import Any

from torch import Tensor

from deepspeed.errors import ConfigError, did_you_mean


def check_arguments(
    where: str, make: Callable[..., Any], given: Mapping[str, Any], *, hidden: Collection[str] = ()
) -> None:
    """Raise ConfigError unless ``make(..., **given)`` has the right names, types and nothing missing.

    Args:
        where: path of the section, e.g. ``optimizer.params``.
        make: class or function that will be called; its first parameter does not come from here.
        given: its keyword arguments.
        hidden: parameters that a configuration cannot give.
    """
    name = getattr(make, "__name__", str(make))
    _, *parameters = inspect.signature(make).parameters.values()
    accepted = {parameter.name: parameter for parameter in parameters if parameter.name not in hidden}
    for key, value in given.items():
        if key not in accepted:
            raise ConfigError(
                f"{where}.{key}: {name} has no such argument{did_you_mean(key, accepted)}; "
                f"it takes {', '.join(accepted)}"
            )
        expected = _expectation(accepted[key])
        if expected is not None and not _fits(value, expected):
            raise ConfigError(f"{where}.{key}: expected {expected}, got {value!r}")
    for key, parameter in accepted.items():
        if parameter.default is inspect.Parameter.empty and key not in given:
            raise ConfigError(f"{where}.{key}: {name} needs it, and it was not given")


def _expectation(parameter: inspect.Parameter) -> str | None:
    """Say what a parameter takes, judged by its default and annotation; None where that is not clear."""
    text, default = str(parameter.annotation), parameter.default
    if isinstance(default, bool):
        return "true or false"
    if isinstance(default, tuple):
        return f"a list of {len(default)} numbers"
    if text in ("float", "<class 'float'>", "int", "<class 'int'>"):
        return "a number"
    if isinstance(default, (int, float)) and "Sequence" not in text and "PerGroup" not in text:
        return "a number"
    if "PerGroup" in text:
        return "a number or a list of numbers"
    return None


def _fits(value: Any, expected: str) -> bool:
    if expected == "true or false":
        return value in (True, False)
    if expected == "a number":
        return _is_number(value)
    if expected.startswith("a list of"):
        is_list = isinstance(value, (list, tuple)) and f" {len(value)} " in expected
        return is_list and all(part is None or _is_number(part) for part in value)
    values = value if isinstance(value, (list, tuple)) else [value]
    return value is None or all(map(_is_number, values))


def _is_number(value: Any) -> bool:
    return isinstance(value, (Real, Tensor)) and not isinstance(value, bool)
