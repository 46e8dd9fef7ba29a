"""Where the results of a benchmark go: a JSON document with everything and a Markdown page to read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from meter import machine

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
MEASURING = (
    "adam_step.py", "checkpoints_worker.py", "import_time.py", "meter.py", "model.py", "overhead_worker.py", "rows.py",
    "tiers.py", "work.py", "worker.py",
)  # fmt: skip


def header(note: str = "") -> dict[str, Any]:
    """Say when and on what a benchmark runs; call before it starts, so that the load is not its own."""
    now = datetime.now(timezone.utc)
    return {"date": f"{now:%Y-%m-%d %H:%M} UTC", "machine": machine(), "source": source(), "note": note}


def source() -> str:
    """Name what is measured: a digest of the package and of what measures it in the suite."""
    digest = hashlib.sha256()
    package = sorted((HERE.parent / "deepspeed").rglob("*.py"))
    for path in [*package, *(HERE / name for name in MEASURING)]:
        digest.update(f"{path.relative_to(HERE.parent)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def header_lines(head: dict[str, Any], versions: dict[str, str]) -> list[str]:
    """Write the header as Markdown paragraphs."""
    box = head["machine"]
    lines = [
        f"Measured {head['date']} on {box['processor']} ({box['vector']}), {box['cores']} cores, "
        f"{box['memory_gib']} GiB, {box['system']}, Python {box['python']}; "
        f"load before the run {box['load_before']}.",
        "Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".",
    ]
    return lines + ([f"**{head['note']}**"] if head["note"] else [])


def markdown_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out a Markdown table, first column left, the others right."""
    widths = [max(len(cell) for cell in column) for column in zip(titles, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        rest = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
        return "| " + " | ".join([first, *rest]) + " |"

    rule = "|" + "|".join("-" * (width + 1) + (":" if i else "-") for i, width in enumerate(widths)) + "|"
    return "\n".join([line(titles), rule, *(line(row) for row in rows)])


def write(name: str, document: dict[str, Any], paragraphs: Sequence[str], folder: Path = RESULTS) -> Path:
    """Write `name.json` and `name.md`; return the path of the page."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
    page = folder / f"{name}.md"
    page.write_text("\n\n".join(paragraphs) + "\n")
    return page
