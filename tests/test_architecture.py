"""The laws of the tree: floors, cycles and sizes."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "deepspeed"
FILES = sorted(PACKAGE.rglob("*.py"))

FLOORS = {
    0: {"accelerator", "errors", "common", "version", "arguments", "config.base"},
    1: {"comm"},
    2: {"precision", "parallel", "config"},
    3: {"offload", "data", "schedules", "monitor", "profiling", "ops"},
    4: {"zero", "pipe", "moe", "tensor_parallel", "sequence", "activation_checkpointing", "compression"},
    5: {"checkpoint"},
    6: {"engine"},
    7: {
        "",
        "launcher",
        "inference",
        "autotuning",
        "elasticity",
        "utils",
        "runtime",
        "env_report",
        "git_version_info",
    },
}
FLOOR_OF = {name: floor for floor, names in FLOORS.items() for name in names}
ALONE = {"deepspeed/engine/accessors.py"}  # documented one-line accessors: they do not count as methods


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def place_of(module: str) -> str:
    inner = module.split(".")[1:]
    return ".".join(inner[:2]) if ".".join(inner[:2]) in FLOOR_OF else (inner[0] if inner else "")


def imports_of(path: Path) -> set[str]:
    """Modules of this package that a file imports when it runs (type-checking imports are not run)."""
    found: set[str] = set()
    package = module_name(path).split(".")
    package = package if path.name == "__init__.py" else package[:-1]

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names if alias.name.startswith("deepspeed"))
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module.startswith("deepspeed"):
                for alias in node.names:
                    name = f"{module}.{alias.name}"
                    found.add(
                        name
                        if (PACKAGE.parent / Path(*name.split("."))).with_suffix(".py").exists()
                        or (PACKAGE.parent / Path(*name.split("."))).is_dir()
                        else module
                    )
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_file_imports_its_own_folder_and_lower_floors_only(path):
    own = place_of(module_name(path))
    for module in imports_of(path):
        other = place_of(module)
        if other.split(".")[0] != own.split(".")[0] or (other == "" and own != ""):
            assert other != "", f"{path.name} imports the top of the package"
            assert FLOOR_OF[other] < FLOOR_OF[own] or FLOOR_OF[own] == 0, (
                f"{own} (floor {FLOOR_OF[own]}) imports {module}"
            )


def test_there_are_no_import_cycles():
    graph = {module_name(path): imports_of(path) for path in FILES}
    state: dict[str, int] = {}

    def visit(name: str, trail: list[str]) -> None:
        state[name] = 1
        for target in graph.get(name, ()):
            assert state.get(target) != 1 or target == name, f"cycle: {' -> '.join([*trail, name, target])}"
            if target not in state:
                visit(target, [*trail, name])
        state[name] = 2

    for name in graph:
        if name not in state:
            visit(name, [])


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_sizes(path):
    source = path.read_text()
    assert len(source.splitlines()) <= 600
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body_start = (
                node.body[1].lineno if ast.get_docstring(node) and len(node.body) > 1 else node.lineno
            )
            assert node.end_lineno - body_start + 1 <= 80, f"{node.name} is too long"
        if isinstance(node, ast.ClassDef) and str(path.relative_to(PACKAGE.parent)) not in ALONE:
            methods = [
                part for part in node.body if isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef))
            ]
            assert len(methods) <= 30, f"{node.name} has {len(methods)} methods"
