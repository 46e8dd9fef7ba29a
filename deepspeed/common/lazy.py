"""Names that are imported when they are first used, and modules that say why they are not there.

Note [Missing modules]
The finder of missing modules stands last in ``sys.meta_path``: it is asked only about what nobody else found, so a
module that comes to exist is found as any other. It raises what the import would have raised, with the reason.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from importlib.abc import MetaPathFinder
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


class _MissingModules(MetaPathFinder):
    """See Note [Missing modules]."""

    def __init__(self, later: Mapping[str, str]) -> None:
        self.later = later

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """Raise ModuleNotFoundError for a module of the table; leave others to Python."""
        if name in self.later:
            raise ModuleNotFoundError(f"{name}: {self.later[name]} is not built yet", name=name)


def explain_missing(later: Mapping[str, str]) -> None:
    """Let imports of the modules in `later`, which maps them to their features, say that these are not built yet."""
    sys.meta_path.append(_MissingModules(later))
