"""Measures what `import deepspeed` adds to `import torch`: this project beside the original.

    python benchmarks/import_time.py [--pairs 7] [--original-python PATH]

Each figure is a fresh process. Results: import_time.json and import_time.md under benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from arguments import add_original, add_results
from launch import child_environment, interpreter_of
from results import header, header_lines, markdown_table, write

from deepspeed.common.commands import count

GOAL = 0.25
NAMES = {"ours": "this project", "original": "original DeepSpeed"}
PROBE = """
import json, sys, time
a = time.perf_counter()
import torch
b = time.perf_counter()
import deepspeed
c = time.perf_counter()
modules = len(sys.modules)
deepspeed.initialize
d = time.perf_counter()
print(json.dumps({"torch": b - a, "added": c - b, "used": d - b, "modules": modules,
                  "versions": {"torch": str(torch.__version__), "deepspeed": str(deepspeed.__version__)}}))
"""


def main() -> None:
    """Measure, print and write."""
    options = parse(sys.argv[1:])
    head = header(options.note)
    for kind in NAMES:
        # Unmeasured: byte code is compiled and files come into the cache.
        probe(kind, options.original_python)
    runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in NAMES}
    for _ in range(options.pairs):
        for kind in NAMES:
            runs[kind].append(probe(kind, options.original_python))
    print(report(runs, head, options.out).read_text())


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=count, default=7)
    add_original(parser)
    add_results(parser)
    return parser.parse_args(arguments)


def probe(kind: str, original_python: Path | None) -> dict[str, Any]:
    """Import in a fresh process and return what it reports."""
    interpreter = interpreter_of(kind, original_python)
    done = subprocess.run(
        [str(interpreter.python), "-c", PROBE],
        env=child_environment(interpreter, 1),
        cwd=interpreter.python.parent,
        check=True,
        capture_output=True,
        text=True,
    )
    record: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return record


def report(runs: dict[str, list[dict[str, Any]]], head: dict[str, Any], out: Path) -> Path:
    """Write JSON and Markdown; return the path of the page."""
    versions = {NAMES[kind]: records[0]["versions"]["deepspeed"] for kind, records in runs.items()}
    versions["torch"] = runs["ours"][0]["versions"]["torch"]
    mine = median(record["added"] for record in runs["ours"])
    used = median(record["used"] for record in runs["ours"])
    met = "met" if mine <= GOAL else "NOT met"
    verdict = (
        f"- This project adds {mine:.2f} s (goal: at most {GOAL}, {met}), and {used:.2f} s once it is used."
    )
    paragraphs = [
        "# What `import deepspeed` adds to `import torch`",
        *header_lines(head, versions),
        markdown_table(
            ["package", "added s", "min-max", "with initialize s", "import torch s", "modules"],
            [_cells(NAMES[kind], records) for kind, records in runs.items()],
        ),
        "*with initialize*: until `deepspeed.initialize` is at hand; this project imports it at first use.",
        verdict,
    ]
    document = {**head, "versions": versions, "verdicts": [verdict], "runs": runs}
    return write("import_time", document, paragraphs, out)


def _cells(name: str, records: list[dict[str, Any]]) -> list[str]:
    added = [record["added"] for record in records]
    return [
        name,
        f"{median(added):.2f}",
        f"{min(added):.2f}-{max(added):.2f}",
        f"{median(record['used'] for record in records):.2f}",
        f"{median(record['torch'] for record in records):.2f}",
        str(records[0]["modules"]),
    ]


if __name__ == "__main__":
    main()
