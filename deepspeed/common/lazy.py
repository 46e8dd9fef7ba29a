"""Names that are imported when they are first used."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def lazy_names(
    module: str, where: Mapping[str, str], later: Mapping[str, str] | None = None
) -> Callable[[str], Any]:
    """Return a module's ``__getattr__`` that finds names in other modules.

    `where` maps a name to the module that has it, or to ``module:other_name``. `later` maps a name that does
    not exist yet to its feature; using it raises ImportError, which ``from module import name`` passes on.
    """

    def find(name: str) -> Any:
        if later and name in later:
            raise ImportError(f"{module}.{name}: {later[name]} is not built yet", name=module)
        target = where.get(name)
        if target is None:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        path, _, other = target.partition(":")
        return getattr(importlib.import_module(path), other or name)

    return find
