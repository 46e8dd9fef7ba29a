"""``ds_ckpt show``: what is in a checkpoint."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from rich.filesize import decimal
from torch import Tensor

from deepspeed.checkpoint.manifest import COUNTERS, Value
from deepspeed.checkpoint.reading import Reader
from deepspeed.checkpoint.tools.contents import (
    PATIENCE,
    Header,
    exact,
    flat,
    for_json,
    header_of,
    in_words,
    kinds_of,
    nbytes_of,
    opened,
    parts_of,
)
from deepspeed.checkpoint.tools.finding import dtype_of_weight, locate
from deepspeed.common import tables
from deepspeed.common.progress import ByteBar
from deepspeed.errors import UsageError, did_you_mean


@dataclass
class Stats:
    """Of the finite elements of a value; std is that of the population; None where there are none."""

    mean: float | None
    std: float | None
    min: float | None
    max: float | None
    not_finite: int


@dataclass
class Row:
    """A tensor of the model.

    Attributes:
        dtype: of the weight in the model.
        role: trained, frozen, buffer; left out: not in the checkpoint.
        values: by kind.
        numbers: states that are numbers.
        stats: by kind.
    """

    name: str
    shape: list[int]
    dtype: str
    role: str
    aliases: list[str]
    values: dict[str, Value]
    numbers: dict[str, Any]
    stats: dict[str, Stats] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all its values."""
        return sum(nbytes_of(value) for value in self.values.values())


def run(asked: argparse.Namespace) -> int:
    """Run the command."""
    folder = locate(asked.folder, asked.tag)
    with opened(folder) as reader:
        header = header_of(reader)
        rows = list(_chosen(_rows(reader), asked.pattern))
        if asked.stats:
            _add_stats(reader, rows)
    if asked.json:
        print(
            json.dumps({"folder": str(folder), **_header_record(header), "tensors": _records(rows)}, indent=1)
        )
        return 0
    if asked.pattern is None:
        tables.show(tables.new_listing(str(folder), _lines(header, rows)))
    tables.show(_table(rows))
    if asked.stats:
        tables.show(_stats_table(rows))
    return 0


# -- tensors --------------------------------------------------------------------------------------


def _rows(reader: Reader) -> Iterator[Row]:
    manifest = reader.manifest
    for name, about in manifest.parameters.items():
        role = "trained" if about["trained"] else "buffer" if about.get("buffer") else "frozen"
        role += ", left out" if about.get("left_out") else ""
        numbers = {key: value for key, (_, value) in manifest.scalars.get(name, {}).items()}
        dtype = dtype_of_weight(manifest, name)
        yield Row(name, about["shape"], dtype, role, about["aliases"], kinds_of(reader, name), numbers)


def _chosen(rows: Iterator[Row], pattern: str | None) -> Iterator[Row]:
    known, chosen = [], False
    for row in rows:
        known.append(row.name)
        if pattern is None or any(_matches(name, pattern) for name in (row.name, *row.aliases)):
            chosen = True
            yield row
    if pattern is not None and not chosen:
        raise UsageError(f"PATTERN: no tensor has a name like {pattern!r}{did_you_mean(pattern, known)}")


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) if set("*?[") & set(pattern) else pattern in name


def _table(rows: Iterable[Row]) -> Any:
    table = tables.new_table("")
    aliases = any(row.aliases for row in rows)
    for name in ("tensor", "shape", "dtype", "size", "role", "values"):
        table.add_column(name, no_wrap=name == "tensor", justify="right" if name == "size" else "left")
    if aliases:
        table.add_column("also called")
    for row in rows:
        cells = [row.name, str(row.shape), row.dtype, decimal(row.nbytes), row.role]
        cells.append(
            " ".join([*row.values, *(f"{key}={in_words(value)}" for key, value in row.numbers.items())])
        )
        table.add_row(*cells, *([", ".join(row.aliases)] if aliases else []))
    return table


def _records(rows: Iterable[Row]) -> list[dict[str, Any]]:
    return [
        {
            "name": row.name,
            "shape": row.shape,
            "dtype": row.dtype,
            "role": row.role,
            "aliases": row.aliases,
            "bytes": row.nbytes,
            "values": {
                kind: {
                    "dtype": value.dtype,
                    "shape": value.shape,
                    **({"stats": asdict(row.stats[kind])} if kind in row.stats else {}),
                }
                for kind, value in row.values.items()
            },
            "numbers": {key: for_json(value) for key, value in row.numbers.items()},
        }
        for row in rows
    ]


# -- statistics -----------------------------------------------------------------------------------


def _add_stats(reader: Reader, rows: list[Row]) -> None:
    with ByteBar("reading", sum(row.nbytes for row in rows), patience=PATIENCE) as bar:
        for row in rows:
            for kind, value in row.values.items():
                row.stats[kind] = stats_of(parts_of(reader, value))
                bar.advance(nbytes_of(value))


def stats_of(parts: Iterable[Tensor]) -> Stats:
    """Return the statistics of a value that comes in parts, of any real dtype."""
    numel, mean, squares, not_finite = 0, 0.0, 0.0, 0
    low, high = math.inf, -math.inf
    for part in parts:
        numbers = torch.view_as_real(part) if part.is_complex() else exact(part)
        finite = numbers[numbers.isfinite()]
        not_finite += numbers.numel() - finite.numel()
        if finite.numel() == 0:
            continue
        count, middle = finite.numel(), float(finite.mean())
        # means and squares of two parts make those of both (Chan, Golub and LeVeque 1979)
        shift, together = middle - mean, numel + count
        squares += float((finite - middle).square().sum()) + shift**2 * numel * count / together
        mean += shift * count / together
        numel = together
        low, high = min(low, float(finite.min())), max(high, float(finite.max()))
    if numel == 0:
        return Stats(None, None, None, None, not_finite)
    return Stats(mean, math.sqrt(squares / numel), low, high, not_finite)


def _stats_table(rows: Iterable[Row]) -> Any:
    table = tables.new_table("")
    odd = any(stats.not_finite for row in rows for stats in row.stats.values())
    names = ["mean", "std", "min", "max", *(["not finite"] if odd else [])]
    for name in ("tensor", "value"):
        table.add_column(name, no_wrap=True)
    for name in names:
        table.add_column(name, justify="right")
    for row in rows:
        for kind, stats in row.stats.items():
            shown = [
                "-" if one is None else f"{one:.4g}" for one in (stats.mean, stats.std, stats.min, stats.max)
            ]
            table.add_row(row.name, kind, *shown, *([str(stats.not_finite)] if odd else []))
    return table


# -- the rest -------------------------------------------------------------------------------------


def _lines(header: Header, rows: list[Row]) -> Iterator[tuple[str, str]]:
    about = header.about
    yield "written by", header.origin
    yield "counters", ", ".join(f"{name} {about[name]}" for name in COUNTERS)
    yield "tensors", f"{len(rows)}, {decimal(sum(row.nbytes for row in rows))}"
    for index, (options, names) in enumerate(zip(header.groups, header.names, strict=True)):
        yield f"param group {index}", f"{len(names)} tensors: {_pairs(options)}"
    yield "schedule", _pairs(header.schedule)
    yield "loss scale", _pairs(about["loss_scaler"])
    yield "data", _pairs(about["data"])
    yield "client state", ", ".join(header.client) or "-"


def _pairs(item: Any) -> str:
    return ", ".join(f"{path} {in_words(value)}" for path, value in flat(item)) if item else "-"


def _header_record(header: Header) -> dict[str, Any]:
    about = header.about
    return {
        **{key: about[key] for key in ("tag", "stage", "world_size", "ds_version", *COUNTERS)},
        "dtype": header.dtype,
        "loss_scaler": _plain(about["loss_scaler"]),
        "data": _plain(about["data"]),
        "param_groups": [
            {**_plain(options), "params": names}
            for options, names in zip(header.groups, header.names, strict=True)
        ],
        "lr_scheduler": _plain(header.schedule),
        "client_state": list(header.client),
    }


def _plain(item: Any) -> Any:
    """Return nested containers as JSON has them."""
    if isinstance(item, dict):
        return {str(key): _plain(value) for key, value in item.items()}
    if isinstance(item, (list, tuple)):
        return [_plain(value) for value in item]
    return for_json(item)
