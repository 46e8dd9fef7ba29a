"""Measures the disk under this project's transfers and under fio: same block size, depth, bytes, direct I/O.

    python benchmarks/disk.py [--folder DIR] [--rounds 9] [--size 1G]

The two take turns, round by round, each on a file of its own that was written before. A row's ratio is the median over
rounds of this project's rate by fio's in the same round, so that a busy disk slows both sides of it.
Results: disk.json and disk.md under benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from arguments import add_results, folder
from results import header, header_lines, markdown_table, write

from deepspeed.common.commands import count, in_words, size
from deepspeed.offload.tools.measure import Bench, Setting
from deepspeed.version import __version__

GOAL = 0.9
SETTINGS = [Setting(block, depth) for block in (2**18, 2**20, 2**22) for depth in (8, 32)]


@dataclass
class Row:
    """One direction and setting; bytes a second of each round."""

    way: str
    setting: Setting
    ours: list[float] = field(default_factory=list)
    fio: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Return the median over rounds of ours by fio's."""
        return median(own / other for own, other in zip(self.ours, self.fio, strict=True))


def main() -> int:
    """Measure, print and write; 1 when the goal is not met."""
    options = parse(sys.argv[1:])
    if shutil.which("fio") is None:
        sys.exit("benchmarks/disk.py: fio is not installed; on Debian and Ubuntu: apt-get install fio")
    head = header(options.note)
    rows = [Row(way, setting) for way in ("write", "read") for setting in SETTINGS]
    with (
        tempfile.TemporaryDirectory(dir=options.folder) as folder,
        closing(Bench(folder, options.size)) as bench,
    ):
        if not bench.direct:
            sys.exit(f"benchmarks/disk.py: {options.folder} has no direct I/O; choose a --folder that has")
        file = Path(folder) / "fio"
        run_fio(file, options.size, Row("write", SETTINGS[-1]))
        for number, _ in enumerate(rounds(rows, options.rounds, bench, file, options.size)):
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr, flush=True)
    print(report(rows, head, options).read_text())
    return 0 if min(row.ratio for row in rows) >= GOAL else 1


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=folder, default=Path(), help="a folder on the disk to measure")
    parser.add_argument("--rounds", type=count, default=9)
    parser.add_argument("--size", type=size, default=2**30, help="bytes a measurement moves")
    add_results(parser)
    return parser.parse_args(arguments)


def rounds(rows: Sequence[Row], count: int, bench: Bench, file: Path, nbytes: int) -> Iterator[None]:
    """Add to each row what both sides did in a round; who begins changes from round to round."""
    for number in range(count):
        for row in rows:
            for ours in (True, False) if number % 2 else (False, True):
                if ours:
                    (spent,) = bench.seconds(row.setting, write=row.way == "write", loops=1, warmup=0)
                    row.ours.append(nbytes / spent)
                else:
                    row.fio.append(run_fio(file, nbytes, row))
        yield


def run_fio(file: Path, nbytes: int, row: Row) -> float:
    """Let fio move the file once; return its bytes a second."""
    done = subprocess.run(
        [
            "fio", "--name=disk", f"--filename={file}", f"--size={nbytes}", f"--rw={row.way}", "--direct=1",
            "--ioengine=libaio", f"--bs={row.setting.block_size}", f"--iodepth={row.setting.queue_depth}",
            "--overwrite=1", "--scramble_buffers=0", "--output-format=json",
        ],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    rate: float = json.loads(done.stdout)["jobs"][0][row.way]["bw_bytes"]
    return rate


def report(rows: Sequence[Row], head: dict[str, Any], options: argparse.Namespace) -> Path:
    """Write JSON and Markdown; return the path of the page."""
    fio = subprocess.run(["fio", "--version"], check=True, capture_output=True, text=True).stdout.strip()
    versions = {"torch": torch.__version__, "this project": __version__, "fio": fio.removeprefix("fio-")}
    worst = min(row.ratio for row in rows)
    document = {
        **head,
        "versions": versions,
        "nbytes": options.size,
        "rows": [
            {"way": row.way, **row.setting.aio(), "ours": row.ours, "fio": row.fio, "ratio": row.ratio}
            for row in rows
        ],
    }
    titles = ["", "block", "depth", "this project GB/s", "min-max", "fio GB/s", "min-max", "ratio"]
    paragraphs = [
        "# Reading and writing a disk",
        f"{in_words(options.size)} moved once in each of {options.rounds} rounds, direct I/O on both sides, a process "
        "each; fio with `libaio`, its buffers in ordinary pages, this project's in large ones. Rates are medians; a "
        "ratio is the median over rounds.",
        *header_lines(head, versions),
        markdown_table(titles, [_cells(row) for row in rows]),
        f"- Slowest ratio: {worst:.2f} (goal: at least {GOAL}, {'met' if worst >= GOAL else 'NOT met'}).",
    ]
    return write("disk", document, paragraphs, options.out)


def _cells(row: Row) -> list[str]:
    cells = [row.way, in_words(row.setting.block_size), str(row.setting.queue_depth)]
    for rates in (row.ours, row.fio):
        cells += [f"{median(rates) / 1e9:.2f}", f"{min(rates) / 1e9:.2f}-{max(rates) / 1e9:.2f}"]
    return [*cells, f"{row.ratio:.2f}"]


if __name__ == "__main__":
    sys.exit(main())
