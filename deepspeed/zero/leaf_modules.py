"""Modules that are gathered as one: marked by the user, listed in the configuration, or too fine to split.

Nothing depends on it for correctness: a block is gathered as one anyway, and what is missing is gathered when
it is used.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from torch import nn

from deepspeed.errors import UsageError

MARK = "_z3_leaf"


class LeafModules(Protocol):
    """Which modules a configuration lists."""

    classes: list[str]
    names: list[str]
    name_suffixes: list[str]


def set_z3_leaf_modules(model: nn.Module, leaf_module_classes: Iterable[type | str]) -> list[nn.Module]:
    """Mark the modules of some classes (or class names, short or full) as gathered as one; return them.

    Raises:
        UsageError: the model has none of them.
    """
    return _mark(model, leaf_module_classes, True)


def unset_z3_leaf_modules(model: nn.Module, leaf_module_classes: Iterable[type | str]) -> list[nn.Module]:
    """Undo `set_z3_leaf_modules`."""
    return _mark(model, leaf_module_classes, False)


def set_z3_leaf_module(model: nn.Module, flag: bool = True) -> None:
    """Mark one module, or take its mark away."""
    setattr(model, MARK, flag)


def z3_leaf_module(model: nn.Module) -> bool:
    """Return whether a module is marked."""
    return bool(getattr(model, MARK, False))


def get_z3_leaf_modules(model: nn.Module) -> list[nn.Module]:
    """Return the marked modules."""
    return [part for part in model.modules() if z3_leaf_module(part)]


def modules_together(model: nn.Module, listed: LeafModules, *, granularity: int = 0) -> set[str]:
    """Return the names of the modules that are gathered as one.

    Args:
        model: the model.
        listed: of the configuration.
        granularity: a module whose parameters, divided by the modules in it, are fewer elements, is one.
    """
    found = set()
    for name, part in model.named_modules():
        suffixed = name.endswith(tuple(listed.name_suffixes))
        too_fine = granularity > 0 and name != "" and _fineness(part) < granularity
        marked = z3_leaf_module(part) or _is_any(part, listed.classes)
        if marked or name in listed.names or suffixed or too_fine:
            found.add(name)
    return found


def _fineness(module: nn.Module) -> float:
    parts = sum(1 for _ in module.modules())
    return sum(param.numel() for param in module.parameters()) / parts


def _mark(model: nn.Module, classes: Iterable[type | str], flag: bool) -> list[nn.Module]:
    wanted: list[Any] = list(classes)
    matching = [part for part in model.modules() if _is_any(part, wanted)]
    if not matching:
        names = [one if isinstance(one, str) else one.__name__ for one in wanted]
        raise UsageError(
            f"leaf_module_classes: expected classes of modules of {type(model).__name__}, got {names}; "
            "none of them is there"
        )
    for part in matching:
        set_z3_leaf_module(part, flag)
    return matching


def _is_any(module: nn.Module, classes: Iterable[type | str]) -> bool:
    cls = type(module)
    names = {cls.__name__, f"{cls.__module__}.{cls.__qualname__}"}
    return any(one in names if isinstance(one, str) else isinstance(module, one) for one in classes)
