"""``ds_nvme_tune``: try settings on a disk and write the best one as an `aio` section.

ds_nvme_tune --nvme_dir /nvme                  aio.json, and aio.png where matplotlib is installed
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from deepspeed.common import commands
from deepspeed.errors import ConfigError, did_you_mean
from deepspeed.offload.tools import tables
from deepspeed.offload.tools.io import add_common
from deepspeed.offload.tools.measure import Bench
from deepspeed.offload.tools.picture import draw
from deepspeed.offload.tools.sweep import Grid, best, measure

USUAL = Grid(block_size=[2**18, 2**20, 2**22, 2**23], queue_depth=[2, 4, 8, 16, 32])
KEYS = [field.name for field in fields(Grid)]


def main(args: Sequence[str] | None = None) -> None:
    """Run the command."""
    commands.run("ds_nvme_tune", _command, args)


def _command(args: Sequence[str] | None) -> None:
    made = parser()
    asked = made.parse_args(args)
    if asked.no_read and asked.no_write:
        made.error("--no_read and --no_write: expected at most one of them, as nothing is left to measure")
    settings = (read_grid(asked.sweep_config) if asked.sweep_config else USUAL).settings()
    directions = [way for way in ("write", "read") if not getattr(asked, f"no_{way}")]
    _check_writable(asked.output)
    bench = Bench(asked.nvme_dir, asked.io_size)
    try:
        coming = measure(bench, settings, directions, loops=asked.loops)
        results = tables.gathered(coming, len(settings), asked.nvme_dir)
    finally:
        bench.close()
    chosen = best(results)
    title = f"{asked.nvme_dir}, {commands.in_words(asked.io_size)}"
    tables.show(results, title, chosen)
    text = json.dumps({"aio": chosen.setting.aio()}, indent=2)
    asked.output.write_text(text + "\n")
    written = str(asked.output)
    if importlib.util.find_spec("matplotlib") is not None:
        picture = asked.output.with_suffix(".png")
        draw(results, chosen, title, picture)
        written += f", {picture}"
    print(f"{text}\n\nwritten: {written}; put the section into the configuration")


def read_grid(path: Path) -> Grid:
    """Read the values to try from a JSON file; what it does not name stays as usual."""
    try:
        given = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"--sweep_config: cannot read {path} as JSON: {error}") from error
    if not isinstance(given, dict):
        raise ConfigError(f"--sweep_config: expected an object with {', '.join(KEYS)} in {path}")
    for name in given:
        if name not in KEYS:
            raise ConfigError(
                f"--sweep_config: {path}: expected {', '.join(KEYS)}, got {name!r}{did_you_mean(name, KEYS)}"
            )
    return Grid(**{name: _values(name, given.get(name, getattr(USUAL, name))) for name in KEYS})


def _values(name: str, given: Any) -> list[int]:
    read = commands.size if name == "block_size" else commands.count
    try:
        values = [read(str(value)) for value in (given if isinstance(given, (list, tuple)) else [given])]
    except argparse.ArgumentTypeError as error:
        raise ConfigError(f"--sweep_config: {name}: {error}") from error
    if not values:
        raise ConfigError(f"--sweep_config: {name}: expected at least one value, got none")
    return values


def _check_writable(path: Path) -> None:
    """Find out before a long measurement whether its result can be written."""
    try:
        path.open("a").close()
    except OSError as error:
        raise ConfigError(f"--output: cannot write {path}: {error.strerror}; name another file") from error


def parser() -> argparse.ArgumentParser:
    """Return the parser."""
    made = argparse.ArgumentParser(
        prog="ds_nvme_tune",
        description="Find the settings with which a disk is fastest, and write them as an aio section.",
        epilog="Sizes take K, M or G. The folder must have io_size bytes free; nothing stays in it.",
        allow_abbrev=False,
    )
    made.add_argument("--nvme_dir", required=True, metavar="DIR", help="a folder on the disk")
    made.add_argument(
        "--sweep_config",
        type=Path,
        metavar="FILE",
        help=f"JSON object with the values to try: {', '.join(KEYS)}",
    )
    made.add_argument("--no_read", action="store_true", help="do not measure reading")
    made.add_argument("--no_write", action="store_true", help="do not measure writing")
    made.add_argument(
        "--output",
        type=Path,
        default=Path("aio.json"),
        metavar="FILE",
        help="the section goes here (default: aio.json), the picture beside it",
    )
    add_common(made)
    return made


if __name__ == "__main__":
    main()
