"""What a checkpoint says of its run and of its tensors, for commands to show and compare."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepspeed.checkpoint.manifest import COUNTERS, MASTER, STATE, WEIGHT, Value
from deepspeed.checkpoint.opening import open_folder
from deepspeed.checkpoint.reading import Reader
from deepspeed.checkpoint.tools.finding import dtype_of

PATIENCE = 0.5
"""Seconds that pass before a command shows a bar."""

CHUNK = 2**20
"""Elements that are read at once."""


@contextmanager
def opened(folder: Path) -> Iterator[Reader]:
    """Open a checkpoint, whoever wrote it."""
    reader = open_folder(folder)
    try:
        yield reader
    finally:
        reader.close()


@dataclass
class Header:
    """What a checkpoint holds besides tensors of the model, as plain data.

    Attributes:
        about: the manifest's: counters, stage, ranks.
        groups: options of the optimizer's param groups.
        names: of the parameters in each group.
        schedule: its state.
        client: the user's state.
    """

    about: dict[str, Any]
    dtype: str
    groups: list[dict[str, Any]]
    names: list[list[str]]
    schedule: Any
    client: dict[str, Any]

    @property
    def origin(self) -> str:
        """What wrote it."""
        about, ranks = self.about, self.about["world_size"]
        many = "" if ranks == 1 else "s"
        return f"stage {about['stage']} on {ranks} rank{many}, {self.dtype}, deepspeed {about['ds_version']}"

    def numbers(self) -> dict[str, Any]:
        """Return all that two checkpoints of the same training have in common, by a path."""
        whole = {
            **{name: self.about[name] for name in COUNTERS},
            "loss_scaler": self.about["loss_scaler"],
            "data": self.about["data"],
            "lr_scheduler": self.schedule,
            "param_groups": self.groups,
            "client_state": self.client,
        }
        return dict(flat(whole))


def header_of(reader: Reader) -> Header:
    """Read what a checkpoint holds besides tensors of the model."""
    about = reader.manifest.about
    main = reader.structure(about["main"])
    client = {key: main[key] for key in main["engine"]["client_keys"]}
    groups, schedule = main["engine"]["param_groups"], main["lr_scheduler"]
    return Header(about, dtype_of(reader.manifest), groups, about["groups"], schedule, client)


def kinds_of(reader: Reader, name: str) -> dict[str, Value]:
    """Return the values of a tensor of the model by kind: weight, master, and the optimizer's states by key."""
    values = reader.manifest.values
    kinds = [WEIGHT, MASTER, *(kind for kind in values if kind.startswith(STATE))]
    return {kind.removeprefix(STATE): values[kind][name] for kind in kinds if name in values.get(kind, {})}


def nbytes_of(value: Value) -> int:
    """Return the bytes of a value."""
    return torch.Size(value.shape).numel() * value.torch_dtype.itemsize


def parts_of(reader: Reader, value: Value) -> Iterator[Tensor]:
    """Yield a value's elements, flat, a part at a time; it is good until the next one."""
    numel = torch.Size(value.shape).numel()
    buffer = torch.empty(min(numel, CHUNK), dtype=value.torch_dtype)
    for start in range(0, numel, CHUNK):
        part = buffer[: min(CHUNK, numel - start)]
        reader.read(value, start, part)
        yield part


def exact(part: Tensor) -> Tensor:
    """Return elements of any dtype as numbers to compute with."""
    return part.to(torch.complex128 if part.is_complex() else torch.float64)


def flat(item: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield what lies in nested containers, with its path, such as ``betas[0]``."""
    if isinstance(item, argparse.Namespace):
        item = vars(item)
    if isinstance(item, dict) and item:
        for key, value in item.items():
            yield from flat(value, f"{path}.{key}" if path else str(key))
    elif isinstance(item, (list, tuple)) and item:
        for index, value in enumerate(item):
            yield from flat(value, f"{path}[{index}]")
    else:
        yield path, item


def in_words(item: Any) -> str:
    """Write a leaf of `flat`."""
    if isinstance(item, Tensor):
        if item.numel() != 1:
            return f"tensor of {str(item.dtype).removeprefix('torch.')} {list(item.shape)}"
        item = item.item()
    return str(item)


def for_json(item: Any) -> Any:
    """Return a leaf as JSON has it: numbers that are not finite are strings."""
    if (
        item is None
        or isinstance(item, (bool, int, str))
        or (isinstance(item, float) and math.isfinite(item))
    ):
        return item
    return in_words(item)
