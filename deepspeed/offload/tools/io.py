"""``ds_io``: how fast a folder's disk is read and written by this package's own transfers.

ds_io --folder /nvme --io_size 1G --block_size 256K 1M --queue_depth 8 32
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from deepspeed.common import commands
from deepspeed.offload.tools import tables
from deepspeed.offload.tools.measure import Bench
from deepspeed.offload.tools.sweep import Grid, Result, measure


def main(args: Sequence[str] | None = None) -> None:
    """Run the command."""
    commands.run("ds_io", _command, args)


def _command(args: Sequence[str] | None) -> None:
    asked = parser().parse_args(args)
    settings = Grid(asked.block_size, asked.queue_depth, asked.io_parallel).settings()
    directions = [way for way in ("write", "read") if asked.only in (None, way)]
    bench = Bench(asked.folder, asked.io_size)
    try:
        coming = measure(bench, settings, directions, loops=asked.loops, warmup=asked.warmup_loops)
        results = tables.gathered(coming, len(settings), asked.folder)
        if asked.validate:
            bench.check()
        direct = bench.direct
    finally:
        bench.close()
    if asked.json:
        print(json.dumps([as_record(result, direct) for result in results], indent=1))
        return
    way = "past the page cache" if direct else "through the page cache: its file system has no direct I/O"
    tables.show(results, f"{asked.folder}, {commands.in_words(asked.io_size)}, {way}")
    if asked.validate:
        print("what was read is what was written")


def as_record(result: Result, direct: bool) -> dict[str, object]:
    """Return a result as plain values, rates in bytes a second."""
    return {**result.setting.aio(), "write": result.write, "read": result.read, "direct": direct}


def parser() -> argparse.ArgumentParser:
    """Return the parser."""
    made = argparse.ArgumentParser(
        prog="ds_io",
        description="Measure how fast a folder's disk is read and written. Several values of a setting are "
        "measured one after the other.",
        epilog="Sizes take K, M or G. The folder must have io_size bytes free; nothing stays in it.",
        allow_abbrev=False,
    )
    add_common(made)
    made.add_argument("--folder", required=True, metavar="DIR", help="a folder on the disk to measure")
    made.add_argument(
        "--block_size",
        type=commands.size,
        nargs="+",
        default=[2**20],
        metavar="SIZE",
        help="bytes of a piece (default: 1M)",
    )
    made.add_argument(
        "--queue_depth",
        type=commands.count,
        nargs="+",
        default=[8],
        metavar="N",
        help="pieces in flight a thread (default: 8)",
    )
    made.add_argument(
        "--io_parallel", type=commands.count, nargs="+", default=[1], metavar="N", help="threads (default: 1)"
    )
    which = made.add_mutually_exclusive_group()
    which.add_argument("--read", dest="only", action="store_const", const="read", help="reading only")
    which.add_argument("--write", dest="only", action="store_const", const="write", help="writing only")
    made.add_argument(
        "--warmup_loops",
        type=commands.count_or_none,
        default=1,
        metavar="N",
        help="times it is moved before that (default: 1)",
    )
    made.add_argument("--validate", action="store_true", help="compare what is read with what was written")
    made.add_argument("--json", action="store_true", help="print JSON, with bytes a second")
    return made


def add_common(made: argparse.ArgumentParser) -> None:
    """Add what both commands take."""
    made.add_argument(
        "--io_size", type=commands.size, default=2**29, metavar="SIZE", help="bytes to move (default: 512M)"
    )
    made.add_argument(
        "--loops",
        type=commands.count,
        default=3,
        metavar="N",
        help="times to move them; the median counts (default: 3)",
    )


if __name__ == "__main__":
    main()
