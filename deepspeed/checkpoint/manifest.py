"""The manifest: one JSON file that says what a checkpoint holds and where every range of every value lies.

It is written last: a folder without it is not a checkpoint.
"""

from __future__ import annotations

import bisect
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from deepspeed.checkpoint.records import FileEntry
from deepspeed.errors import CheckpointError

NAME = "manifest.json"
VERSION = 1

WEIGHT, MASTER, STATE = "weight", "master", "state/"
"""Kinds of values: stored weights and buffers, the copies that are updated, and the optimizer's states by key."""

COUNTERS = ("global_steps", "micro_steps", "global_samples", "skipped_steps")
"""What a run counts."""


class Place(NamedTuple):
    """A range of a flattened value: elements `start` to `start + numel` are a record of a file."""

    file: int
    record: int
    start: int
    numel: int


@dataclass
class Value:
    """A tensor of the checkpoint: what it looks like whole, and where its ranges are."""

    dtype: str
    shape: list[int]
    places: list[Place] = field(default_factory=list)

    @property
    def torch_dtype(self) -> torch.dtype:
        """Its dtype."""
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    def overlaps(self, start: int, stop: int) -> Iterator[tuple[Place, int, int]]:
        """Yield the places that have elements from `start` to `stop`, each with those that it has."""
        first = bisect.bisect_right(self.places, start, key=lambda place: place.start) - 1
        for place in self.places[max(first, 0) :]:
            low, high = max(start, place.start), min(stop, place.start + place.numel)
            if low >= stop:
                break
            if low < high:
                yield place, low, high


Values = dict[str, dict[str, Value]]
"""By kind and name."""


@dataclass
class Manifest:
    """What a checkpoint holds.

    Attributes:
        about: counters and settings of the run (plain data).
        parameters: by name: ``shape``, ``aliases`` (further names of the same tensor), ``trained``, ``left_out``,
            ``buffer``, ``dtype`` in the model.
        values: where the ranges of every value lie.
        scalars: by parameter, the optimizer's states that are numbers: key -> [dtype or None, value].
        files: all files but this one.
    """

    about: dict[str, Any]
    parameters: dict[str, dict[str, Any]] = field(default_factory=dict)
    values: Values = field(default_factory=dict)
    scalars: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: list[FileEntry] = field(default_factory=list)

    def add(self, files: Iterable[FileEntry], values: Values, scalars: dict[str, dict[str, Any]]) -> None:
        """Add what one rank wrote; its places count its own files."""
        offset = len(self.files)
        self.files.extend(files)
        self.scalars.update(scalars)
        for kind, named in values.items():
            mine = self.values.setdefault(kind, {})
            for name, value in named.items():
                whole = mine.setdefault(name, Value(value.dtype, value.shape))
                whole.places += [place._replace(file=place.file + offset) for place in value.places]

    def check_complete(self) -> None:
        """Make sure that the ranges of every value make it whole."""
        for kind, named in self.values.items():
            for name, value in named.items():
                value.places.sort(key=lambda place: place.start)
                reached = 0
                for place in value.places:
                    if place.start != reached:
                        break
                    reached += place.numel
                if reached != torch.Size(value.shape).numel():
                    raise CheckpointError(
                        f"{kind} of {name}: only {reached} of {value.shape} elements were written"
                    )

    def file_named(self, name: str) -> int:
        """Return the index of a file."""
        return next(index for index, entry in enumerate(self.files) if entry.name == name)

    def state_keys(self) -> set[str]:
        """Return the keys of the optimizer's states."""
        kinds = {kind.removeprefix(STATE) for kind in self.values if kind.startswith(STATE)}
        return kinds.union(*self.scalars.values())

    def write(self, folder: Path) -> None:
        """Write the file, so that it is on the disk afterwards."""
        body = self._to_json()
        body["checksum"] = zlib.crc32(_text(body))
        with open(folder / NAME, "wb") as file:
            file.write(_text(body))
            file.flush()
            os.fsync(file.fileno())

    def _to_json(self) -> dict[str, Any]:
        return {
            "format": "deepspeed checkpoint",
            "version": VERSION,
            "about": self.about,
            "parameters": self.parameters,
            "values": values_to_json(self.values),
            "scalars": self.scalars,
            "files": [entry.to_json() for entry in self.files],
        }

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the manifest of a checkpoint.

        Raises:
            CheckpointError: it is not there, damaged, or of a later release.
        """
        path = folder / NAME
        try:
            body = json.loads(path.read_bytes())
            checksum = body.pop("checksum")
            good = zlib.crc32(_text(body)) == checksum
        except FileNotFoundError:
            raise CheckpointError(
                f"{path}: missing, so {folder} is not a whole checkpoint of this release"
            ) from None
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}") from None
        except (ValueError, KeyError, AttributeError):
            good = False
        if not good:
            raise CheckpointError(f"{path}: damaged: it is not the file that was written")
        if body["version"] > VERSION:
            raise CheckpointError(
                f"{path}: version: expected at most {VERSION}, got {body['version']}; update deepspeed to load it"
            )
        values = values_from_json(body["values"])
        files = [FileEntry.from_json(entry) for entry in body["files"]]
        return cls(body["about"], body["parameters"], values, body["scalars"], files)


def values_to_json(values: Values) -> dict[str, Any]:
    """Return plain data."""
    return {
        kind: {
            name: [one.dtype, one.shape, [list(place) for place in one.places]] for name, one in named.items()
        }
        for kind, named in values.items()
    }


def values_from_json(data: dict[str, Any]) -> Values:
    """Undo `values_to_json`."""
    return {
        kind: {
            name: Value(dtype, shape, [Place(*place) for place in places])
            for name, (dtype, shape, places) in named.items()
        }
        for kind, named in data.items()
    }


def _text(body: dict[str, Any]) -> bytes:
    return json.dumps(body, separators=(",", ":")).encode()
