"""``ds_ckpt diff``: how two checkpoints differ, whatever layout, stage and precision wrote each."""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deepspeed.checkpoint.manifest import MASTER, WEIGHT, Value
from deepspeed.checkpoint.reading import Reader
from deepspeed.checkpoint.tools.contents import (
    PATIENCE,
    exact,
    for_json,
    header_of,
    in_words,
    kinds_of,
    nbytes_of,
    opened,
    parts_of,
)
from deepspeed.checkpoint.tools.finding import locate
from deepspeed.common import tables
from deepspeed.common.progress import ByteBar


@dataclass
class Pair:
    """The same value in both checkpoints; None where one has it not."""

    name: str
    kind: str
    first: Value | None
    second: Value | None


@dataclass
class Difference:
    """How the values of a pair differ.

    Attributes:
        what: missing, shape, dtype or values.
        largest: absolute difference of two elements; None where they were not compared.
        share: of the elements that differ.
    """

    pair: Pair
    what: str
    largest: float | None = None
    share: float | None = None


def run(asked: argparse.Namespace) -> int:
    """Run the command."""
    places = [locate(asked.first, None), locate(asked.second, None)]
    with opened(places[0]) as first, opened(places[1]) as second:
        pairs = list(pairs_of(first, second))
        total = sum(nbytes_of(one) for pair in pairs for one in (pair.first, pair.second) if one is not None)
        with ByteBar("comparing", total, patience=PATIENCE) as bar:
            compared = [compare(first, second, pair, bar.advance) for pair in pairs]
        headers = [header_of(first), header_of(second)]
        odds = [
            *_differing(headers[0].numbers(), headers[1].numbers()),
            *_differing_states(first, second),
        ]
    found = [one for one in compared if one is not None]
    equal = not found and not odds
    if asked.json:
        record = {
            "equal": equal,
            "folders": [str(place) for place in places],
            "compared": len(pairs),
            "values": [_record(one) for one in found],
            "others": [
                {"what": odd.what, "first": for_json(odd.first), "second": for_json(odd.second)}
                for odd in odds
            ],
        }
        print(json.dumps(record, indent=1))
        return 0 if equal else 1
    sides = zip(("first", "second"), places, headers, strict=True)
    tables.show(tables.new_listing("", ((side, f"{place}: {one.origin}") for side, place, one in sides)))
    if found:
        tables.show(_values_table(found))
    if odds:
        tables.show(_odds_table(odds))
    print(f"{len(pairs) - len(found)} of {len(pairs)} values are equal")
    return 0 if equal else 1


# -- values ---------------------------------------------------------------------------------------


def pairs_of(first: Reader, second: Reader) -> Iterator[Pair]:
    """Yield every value of either checkpoint with that of the other.

    Where one has masters and the other trained weights of that dtype, these are compared. Where one has no weights
    beside its masters, the masters are enough.
    """
    theirs = {
        alias: name
        for name, about in second.manifest.parameters.items()
        for alias in (name, *about["aliases"])
    }
    used = set()
    for name, about in first.manifest.parameters.items():
        match = next((theirs[alias] for alias in (name, *about["aliases"]) if alias in theirs), None)
        used.add(match)
        mine = kinds_of(first, name)
        other = {} if match is None else kinds_of(second, match)
        for kind in dict.fromkeys((*mine, *other)):
            if kind == WEIGHT and MASTER in mine and MASTER in other and not (kind in mine and kind in other):
                continue
            yield Pair(name, kind, _of_kind(mine, other, kind), _of_kind(other, mine, kind))
    for name in second.manifest.parameters:
        if name not in used:
            for kind, value in kinds_of(second, name).items():
                yield Pair(name, kind, None, value)


def _of_kind(mine: dict[str, Value], other: dict[str, Value], kind: str) -> Value | None:
    weight = mine.get(WEIGHT)
    if kind == MASTER and kind not in mine and weight is not None and weight.dtype == other[kind].dtype:
        return weight
    return mine.get(kind)


def compare(
    first: Reader, second: Reader, pair: Pair, progress: Callable[[int], object]
) -> Difference | None:
    """Return how a pair differs, or None where it does not; reads a part at a time."""
    one, other = pair.first, pair.second
    if one is None or other is None:
        return Difference(pair, "missing")
    if one.shape != other.shape:
        return Difference(pair, "shape")
    largest, count = 0.0, 0
    for mine, theirs in zip(parts_of(first, one), parts_of(second, other), strict=True):
        most, many = _distance(mine, theirs)
        largest, count = max(largest, most), count + many
        progress(mine.nbytes + theirs.nbytes)
    share = count / max(torch.Size(one.shape).numel(), 1)
    if one.dtype != other.dtype:
        return Difference(pair, "dtype", largest, share)
    return Difference(pair, "values", largest, share) if count else None


def _distance(mine: Tensor, theirs: Tensor) -> tuple[float, int]:
    """Return the largest difference, and how many elements differ; NaN is equal to NaN, and far from all else."""
    if mine.dtype == theirs.dtype and torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8)):
        return 0.0, 0
    if mine.dtype != theirs.dtype or mine.is_floating_point():
        mine, theirs = exact(mine), exact(theirs)
    differs = (mine != theirs) & ~(mine.isnan() & theirs.isnan())
    gaps = (exact(mine[differs]) - exact(theirs[differs])).abs()
    return float(gaps.nan_to_num(nan=math.inf, posinf=math.inf).max()) if len(gaps) else 0.0, len(gaps)


def _values_table(found: list[Difference]) -> Any:
    table = tables.new_table("")
    for name in ("tensor", "value", "first", "second", "largest difference", "elements that differ"):
        table.add_column(name, no_wrap=name == "tensor", justify="right" if " " in name else "left")
    for one in found:
        largest = "-" if one.largest is None else f"{one.largest:.3g}"
        share = "-" if one.share is None else f"{100 * one.share:.3g} %"
        table.add_row(
            one.pair.name, one.pair.kind, _look(one.pair.first), _look(one.pair.second), largest, share
        )
    return table


def _look(value: Value | None) -> str:
    return "missing" if value is None else f"{value.dtype} {value.shape}"


def _record(one: Difference) -> dict[str, Any]:
    looks = [
        None if value is None else {"dtype": value.dtype, "shape": value.shape}
        for value in (one.pair.first, one.pair.second)
    ]
    return {
        "name": one.pair.name,
        "value": one.pair.kind,
        "what": one.what,
        "first": looks[0],
        "second": looks[1],
        "largest_difference": for_json(one.largest),
        "differing": one.share,
    }


# -- the rest --------------------------------------------------------------------------------------


@dataclass
class Odd:
    """What is no tensor of the model, and differs."""

    what: str
    first: Any
    second: Any


def _differing(first: dict[str, Any], second: dict[str, Any]) -> Iterator[Odd]:
    for name in dict.fromkeys((*first, *second)):
        one, other = first.get(name, "missing"), second.get(name, "missing")
        if not _same(one, other):
            yield Odd(name, one, other)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and (one == other or (one != one and other != other))


def _differing_states(first: Reader, second: Reader) -> Iterator[Odd]:
    """Yield the optimizer's states that are numbers and differ, together for all tensors where they do alike."""
    mine, theirs = first.manifest.scalars, second.manifest.scalars
    counts: Counter[tuple[str, Any, Any]] = Counter()
    for name in mine.keys() & theirs.keys():
        for key in dict.fromkeys((*mine[name], *theirs[name])):
            one, other = (side[name].get(key, [None, "missing"])[1] for side in (mine, theirs))
            if not _same(one, other):
                counts[key, one, other] += 1
    for (key, one, other), count in counts.items():
        yield Odd(f"{key} of {count} tensors", one, other)


def _odds_table(odds: list[Odd]) -> Any:
    table = tables.new_table("")
    for name in ("", "first", "second"):
        table.add_column(name)
    for odd in odds:
        table.add_row(odd.what, in_words(odd.first), in_words(odd.second))
    return table
