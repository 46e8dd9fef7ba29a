"""From what the caller gives (dict, path, base64) to a checked DeepSpeedConfig."""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hjson
from pydantic import ValidationError

from deepspeed.common.logging import set_log_level, warn_once
from deepspeed.config.auto import resolve_precision
from deepspeed.config.base import explain, shown
from deepspeed.config.batch import GAS, MICRO, TRAIN, solve
from deepspeed.config.inert import report_inert
from deepspeed.config.legacy import Modernised, modernise
from deepspeed.config.root import DeepSpeedConfig
from deepspeed.config.rules import check
from deepspeed.config.sources import Provenance
from deepspeed.config.tree import AUTO, Findings, read
from deepspeed.config.unbuilt import refuse_unbuilt as refuse
from deepspeed.config.zero import ZeroSection
from deepspeed.errors import ConfigError

Source = Mapping[str, Any] | str | os.PathLike[str]


def load_config(
    source: Source, *, world_size: int = 1, bf16_supported: bool = True, refuse_unbuilt: bool = True
) -> DeepSpeedConfig:
    """Read, type and check a configuration.

    `source` is a dict, the path of a JSON file (comments, unquoted keys and trailing commas are accepted) or
    urlsafe base64 of JSON. `world_size` counts the ranks the batch is spread over. Sections whose feature
    does not exist yet raise NotBuiltError when they ask for something, unless `refuse_unbuilt` is False.
    Raises ConfigError with one line for each wrong key.
    """
    config = read_config(source, bf16_supported=bf16_supported)
    check(config)
    if refuse_unbuilt:
        refuse(config)
    _solve_batch(config, _data_parallel_size(config, world_size))
    _set_log_level(config)
    report_inert(config)
    return config


def read_config(source: Source, *, bf16_supported: bool = True) -> DeepSpeedConfig:
    """Read and type a configuration, as long as its batch sizes may still be unknown; see `load_config`."""
    raw = source if isinstance(source, Mapping) else parse(source)
    config = _build(raw, modernise(_copy(raw)))
    resolve_precision(config, bf16_supported=bf16_supported)
    return config


def parse(source: Any) -> dict[str, Any]:
    """Return the tree in the file or base64 text `source`; a key that stands twice is an error."""
    if not isinstance(source, (str, os.PathLike)):
        raise ConfigError(
            f"config: expected a dict, the path of a JSON file or base64 of JSON, got {shown(source)}"
        )
    path = Path(source)
    try:
        found = path.is_file()
        if path.is_dir():
            raise ConfigError(f"config: expected the path of a file, got the folder {path}")
    except OSError:  # a base64 text can be longer than any file name
        found = False
    if found:
        return _parse_text(_read_file(path), str(path))
    decoded = _decode(str(source))
    if decoded is None:
        raise ConfigError(
            f"config: expected a dict, the path of an existing JSON file or base64 of JSON, "
            f"got {shown(str(source))}; there is no such file (working folder: {os.getcwd()})"
        )
    return _parse_text(decoded, "base64 config")


def _read_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: expected a readable UTF-8 text, got {error}") from None


def _decode(text: str) -> str | None:
    try:
        decoded = base64.urlsafe_b64decode(text.encode("ascii")).decode("utf-8")
    except (binascii.Error, ValueError):
        return None
    return decoded if decoded.lstrip().startswith("{") else None


def _parse_text(text: str, name: str) -> dict[str, Any]:
    if not text.strip():
        raise ConfigError(f"{name}: expected JSON, got an empty text")
    try:
        tree = hjson.loads(text, object_pairs_hook=_without_duplicates)
    except hjson.HjsonDecodeError as error:
        raise ConfigError(f"{name}: expected JSON, got a syntax error: {error}") from None
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None
    except (ValueError, OverflowError, RecursionError) as error:  # endless numbers, endless nesting
        raise ConfigError(f"{name}: expected JSON, got what cannot be read: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{name}: expected one object, got {shown(tree)}")
    return tree


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) != len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ConfigError(
            f"{', '.join(twice)}: expected each key once, got duplicate keys {shown(twice)}; remove one"
        )
    return tree


def _copy(value: Any) -> Any:
    """Copy dicts and lists, so that the caller's are never changed; share everything else."""
    if isinstance(value, Mapping):
        return {name: _copy(inner) for name, inner in value.items()}
    return [_copy(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _build(raw: Mapping[str, Any], done: Modernised) -> DeepSpeedConfig:
    found = Findings(spelled=done.spelled)
    values = read(DeepSpeedConfig, done.tree, found)
    errors = done.errors + found.errors
    try:
        config = DeepSpeedConfig.model_validate(values)
    except ValidationError as error:
        errors += explain(error, found.spelled)
    if errors:
        raise ConfigError("\n".join(errors))
    config._raw = raw
    config._provenance = Provenance(
        user=set(found.user), auto=dict.fromkeys(found.auto), spelled=found.spelled
    )
    for text in done.warnings:
        warn_once(text)
    if found.strangers:
        names = ", ".join(_stranger(name) for name in found.strangers)
        warn_once(f"configuration keys taken for another tool's: {names}")
    return config


def _stranger(name: str) -> str:
    """Return the name of an unknown key; if it is one of `zero_optimization`, with the place where it would count."""
    return (
        f"{name} (here it would count: zero_optimization.{name})"
        if name in ZeroSection.model_fields
        else name
    )


def _data_parallel_size(config: DeepSpeedConfig, world_size: int) -> int:
    sequence = config.sequence_parallel_size or 1
    if world_size % sequence:
        raise ConfigError(f"sequence_parallel_size: expected a divisor of {world_size} ranks, got {sequence}")
    size = world_size // sequence
    if config.data_parallel_size not in (None, size):
        raise ConfigError(
            f"data_parallel_size: expected {size} ({world_size} ranks / {sequence} per sequence), "
            f"got {config.data_parallel_size}"
        )
    return size


def _solve_batch(config: DeepSpeedConfig, dp: int) -> None:
    def given(path: str) -> int | str | None:
        return AUTO if config.is_auto(path) else getattr(config, path)

    sources = {path: config.source_of(path) for path in (TRAIN, MICRO, GAS)}
    sizes = solve(given(TRAIN), given(MICRO), given(GAS), dp, sources=sources)
    config.set_batch(sizes, "from the other batch sizes")


def _set_log_level(config: DeepSpeedConfig) -> None:
    level = config.log_level or ("info" if config.verbose else None)
    if level:
        set_log_level(level)
