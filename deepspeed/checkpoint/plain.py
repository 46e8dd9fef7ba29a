"""A user's state as plain data and tensors, which every reader of torch files opens without running code, and back.

{"epoch": 3, "args": Namespace(lr=0.1), "seen": np.array([1, 2])}
plain   {"epoch": 3, "args": {"lr": 0.1}, "seen": tensor([1, 2])}
types   [[["args"], "namespace"], [["seen"], "numpy"]]
"""

from __future__ import annotations

import argparse
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepspeed.errors import UsageError

SCALARS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
Types = list[list[Any]]
"""Paths of what was not plain before, with what it was."""

MAX_BITS = 2032
"""Of an int: torch.load(weights_only=True) knows none that are longer than 255 bytes."""
MAX_DEPTH = 100


def to_plain(item: Any, what: str) -> tuple[Any, Types]:
    """Return `item` as plain data and tensors, and how to undo that.

    Args:
        item: plain data, tensors, numpy arrays and scalars, ``argparse.Namespace``, in dicts, lists, tuples, sets.
        what: how errors call it.

    Raises:
        UsageError: something else is in it; the key is named.
    """
    types: Types = []
    return _convert(item, [], what, types), types


def from_plain(item: Any, types: Types) -> Any:
    """Undo `to_plain`."""
    for path, kind in sorted(types, key=lambda one: -len(one[0])):  # what is inside first
        item = _replace(item, path, _BACK[kind])
    return item


def _convert(item: Any, path: list[Any], what: str, types: Types) -> Any:
    kind = type(item)
    if len(path) > MAX_DEPTH:
        raise _refusal(what, path[:3], f"containers in each other {MAX_DEPTH} deep, or one in itself")
    if isinstance(item, (np.ndarray, np.generic)):
        types.append([path, "numpy" if isinstance(item, np.ndarray) else "number"])
        try:
            return torch.from_numpy(np.array(item, order="C"))
        except (TypeError, ValueError):  # objects, text, times, another byte order, wider floats
            raise _refusal(what, path, f"a {_name(kind)} of dtype {item.dtype}") from None
    if isinstance(item, Tensor):
        if item.layout is not torch.strided or item.is_meta or item.is_quantized:
            raise _refusal(what, path, "a tensor that is sparse, quantized or without values")
        return item.detach().resolve_conj().resolve_neg()
    if kind is argparse.Namespace:
        types.append([path, "namespace"])
        item, kind = vars(item), dict
    if kind in (dict, OrderedDict):
        for key in item:
            if not _is_scalar(key) or key != key:  # nothing finds the latter again
                raise _refusal(what, [*path, key], f"a key of {type(key).__name__}")
        return kind((key, _convert(value, [*path, key], what, types)) for key, value in item.items())
    if kind in (list, tuple):
        return kind(_convert(value, [*path, index], what, types) for index, value in enumerate(item))
    if _is_scalar(item) or (kind in (set, torch.Size) and all(_is_scalar(value) for value in item)):
        return item
    raise _refusal(
        what, path, f"a {_name(kind)}" if kind is not int else f"an int of {item.bit_length()} bits"
    )


def _is_scalar(item: Any) -> bool:
    return type(item) in SCALARS and not (type(item) is int and item.bit_length() > MAX_BITS)


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _refusal(what: str, path: list[Any], found: str) -> UsageError:
    place = what + "".join(f"[{step!r}]" for step in path)
    return UsageError(
        f"{place}: expected plain data, tensors, numpy arrays or argparse.Namespace, got {found}; a checkpoint "
        "holds no code: save what it is made of instead"
    )


def _replace(item: Any, path: list[Any], change: Callable[[Any], Any]) -> Any:
    if not path:
        return change(item)
    step, rest = path[0], path[1:]
    if isinstance(item, tuple):
        return tuple(_replace(one, rest, change) if at == step else one for at, one in enumerate(item))
    item[step] = _replace(item[step], rest, change)
    return item


_BACK: dict[str, Callable[[Any], Any]] = {
    "numpy": lambda tensor: tensor.numpy().copy(),
    "number": lambda tensor: tensor.numpy()[()],
    "namespace": lambda values: argparse.Namespace(**values),
}
