"""The page over all comparisons, made from the JSON files that are there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from comparison_goals import Verdict, verdicts
from comparison_table import MIB, Summary, Turn, summarise, times
from results import header_lines, markdown_table
from rows import label
from suite_settings import SETTINGS, SINGLES, Setting, Single

TITLES = (
    "", "row", "ours ms", "original ms", "DDP ms", "FSDP2 ms", "limit ms", "x original", "x DDP", "x FSDP2",
    "x limit", "ours MiB", "original MiB", "of original", "goals", "",
)  # fmt: skip


def write_index(folder: Path) -> Path:
    """Write index.md over what is in `folder`; return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "index.md"
    page.write_text("\n\n".join(paragraphs(folder)) + "\n")
    return page


def paragraphs(folder: Path) -> list[str]:
    """Write the table of training steps, what else was measured, and what was not."""
    # Figures of other work under the same name, made by hand, are not this setting's.
    settings = [
        (each, found)
        for each in SETTINGS
        if (found := load(folder, each.name)) and found.get("work") == asdict(each.work)
    ]
    singles = [(each, found) for each in SINGLES if (found := load(folder, each.name))]
    rows = [line for setting, found in settings for line in _lines(setting, found)]
    present = {each.name for each, _ in (*settings, *singles)}
    missing = [each.name for each in (*SETTINGS, *SINGLES) if each.name not in present]
    return [
        "# All comparisons",
        "`make bench` measures them, `python benchmarks/suite.py --index` writes this page from the figures that are "
        "there. *x original* (same stage), *x DDP* and *x FSDP2*: times as fast; *x limit*: times as long as the raw "
        "forward, backward and update of one rank without communication; medians of the ratios within a round. "
        "Peak resident memory of a rank.",
        *([markdown_table(TITLES, rows)] if rows else []),
        *(["## Training steps", *(_story(*pair) for pair in settings)] if settings else []),
        *(["## Other benchmarks", *(_story(*pair) for pair in singles)] if singles else []),
        *_profiles(folder),
        *([f"Not measured yet: {', '.join(missing)}."] if missing else []),
    ]


def _profiles(folder: Path) -> list[str]:
    """List the pages that say where the steps of a row go."""
    titles = {page: page.read_text().splitlines()[0].lstrip("# ") for page in folder.glob("profile_*.md")}
    lines = [f"- {title}: [{page.stem}]({page.name})" for page, title in sorted(titles.items())]
    return ["## Where the time and the memory of a step are", "\n".join(lines)] if lines else []


def load(folder: Path, name: str) -> dict[str, Any]:
    """Read what a benchmark left; empty where there is nothing."""
    path = folder / f"{name}.json"
    try:
        found = json.loads(path.read_text()) if path.exists() else {}
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}")
    except ValueError as error:  # what is not JSON or not text, too
        raise SystemExit(
            f"{path}: expected a JSON object, but {error}; remove it and measure anew"
        ) from error
    return found


def _lines(setting: Setting, document: dict[str, Any]) -> list[list[str]]:
    """Write the cells of each of this project's rows; one that failed has no figures."""
    summaries = summarise([Turn(**turn) for turn in document["turns"]], setting.work.tokens, label)
    held = verdicts(summaries, setting.work)
    rows = {s.row: s for s in summaries}
    lines = []
    for row in (row for row in document["rows"] if row.startswith("ours")):
        name = label(row).partition(", ")[2]
        if row in rows:
            mine = [verdict for verdict in held if verdict.row == row]
            lines.append([setting.title, name, *_figures(rows[row], rows), *_goals(mine)])
        else:
            lines.append([setting.title, name, *["-"] * (len(TITLES) - 3), "FAILED"])
    return lines


def _figures(mine: Summary, rows: dict[str, Summary]) -> list[str]:
    original = rows.get(mine.row.replace("ours", "original"))
    beside = [original, *(rows.get(name) for name in ("ddp", "fsdp2", "alone"))]
    return [
        *("-" if s is None else f"{s.total * 1e3:.0f}" for s in (mine, *beside)),
        times(mine.against_original),
        times(mine.against_ddp),
        times(mine.against_fsdp2),
        times(mine.over_alone),
        *("-" if s is None else f"{s.peak / MIB:.0f}" for s in (mine, original)),
        times(mine.share),
    ]


def _goals(held: Sequence[Verdict]) -> list[str]:
    goals = ", ".join(f"{v.name} {'<=' if v.at_most else '>='} {v.goal:g}" for v in held)
    missed = ", ".join(v.name for v in held if not v.met)
    if not held:
        return ["-", "-"]
    return [goals, f"NOT met: {missed}" if missed else "met"]


def _story(each: Setting | Single, document: dict[str, Any]) -> str:
    """Say when, on what and with what versions something was measured, and what failed."""
    lines = [f"[{each.name}]({each.name}.md): {each.title}."]
    if rounds := len({turn["round"] for turn in document.get("turns", [])}):
        lines.append(f"Rounds: {rounds}.")
    lines += header_lines(document, document["versions"])
    failures = [
        f"**{label(row)} failed:** {why.splitlines()[-1]}"
        for row, why in document.get("failures", {}).items()
    ]
    return "\n".join([" ".join([*lines, *failures]), *document.get("verdicts", [])])
