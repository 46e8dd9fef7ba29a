"""Whatever the installed libraries and the guides take from this package is there, or is refused by name."""

from __future__ import annotations

import ast
import importlib
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

import deepspeed

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LIBRARIES = ("transformers", "accelerate", "peft", "trl", "lightning", "diffusers")


def names_in(source: str) -> set[str]:
    """Return dotted names under ``deepspeed`` that a file imports, or reads from the package."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.asname is None or "." in alias.name}
        elif isinstance(node, ast.Attribute):
            found.add(ast.unparse(node))
    return {name for name in found if name.startswith("deepspeed.")}


def taken_by(library: str) -> set[str]:
    folder = Path(find_spec(library).origin).parent
    sources = (path.read_text(errors="replace") for path in folder.rglob("*.py"))
    return set().union(*(names_in(source) for source in sources if "deepspeed" in source))


def find(name: str) -> object:
    """Return what a dotted name means, importing modules where attributes end."""
    found = deepspeed
    path = "deepspeed"
    for part in name.split(".")[1:]:
        path = f"{path}.{part}"
        try:
            found = getattr(found, part)
        except AttributeError as error:
            if "not built yet" in str(error) or not hasattr(found, "__path__"):
                raise
            found = importlib.import_module(path)
    return found


def missing(names: set[str]) -> dict[str, str]:
    """Return what neither exists nor is refused by name, with the error."""
    found = {}
    for name in sorted(names):
        try:
            find(name)
        except (ImportError, AttributeError) as error:
            if "not built yet" not in str(error):
                found[name] = str(error)
    return found


@pytest.mark.parametrize("library", LIBRARIES)
def test_what_a_library_takes_is_there_or_refused_by_name(library):
    taken = taken_by(library)
    assert taken, library
    assert missing(taken) == {}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_is_there(page):
    names = re.findall(r"(?<![\w./-])((?:deepspeed|zero|comm|utils)\.[A-Za-z_][\w.]*\w)", page.read_text())
    assert missing({name if name.startswith("deepspeed.") else f"deepspeed.{name}" for name in names}) == {}
