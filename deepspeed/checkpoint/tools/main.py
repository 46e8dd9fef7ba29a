"""``ds_ckpt``: list, check, show, compare, export and import checkpoints.

ds_ckpt list checkpoints
ds_ckpt verify checkpoints --all
ds_ckpt show checkpoints 'blocks.0.*' --stats
ds_ckpt diff checkpoints/global_step10 checkpoints/global_step20
ds_ckpt export checkpoints weights --dtype bf16

Commands are imported when they are called, as they need torch: help and wrong arguments are answered at once.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from deepspeed.common import commands

MODULES = {
    "list": "listing",
    "verify": "verifying",
    "show": "showing",
    "diff": "comparing",
    "export": "exporting",
    "import": "importing",
}
"""By command: the file whose `run` is called."""

Parts: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def main(args: Sequence[str] | None = None) -> None:
    """Run the command."""
    commands.run("ds_ckpt", _command, args)


def _command(args: Sequence[str] | None) -> int:
    asked = parser().parse_args(args)
    module = importlib.import_module(f"deepspeed.checkpoint.tools.{MODULES[asked.command]}")
    code: int = module.run(asked)
    return code


def parser() -> argparse.ArgumentParser:
    """Return the parser."""
    made = argparse.ArgumentParser(
        prog="ds_ckpt",
        description="Look into checkpoints.",
        epilog="DIR is a folder of checkpoints or one of them.",
        allow_abbrev=False,
    )
    parts = made.add_subparsers(dest="command", required=True, metavar="COMMAND")
    list_ = _add(parts, "list", "what checkpoints a folder has")
    verify = _add(parts, "verify", "read everything and compare all checksums; exit code 1: damaged")
    which = verify.add_mutually_exclusive_group()
    _add_tag(which)
    which.add_argument("--all", action="store_true", help="every checkpoint in the folder")
    show = _add(parts, "show", "what is in a checkpoint")
    _add_tag(show)
    show.add_argument(
        "pattern",
        nargs="?",
        metavar="PATTERN",
        help="tensors of such names only: a part of it, or with * and ?",
    )
    show.add_argument("--stats", action="store_true", help="mean, std, min and max of all values")
    diff = _add(parts, "diff", "how two checkpoints differ; exit code 1: they do", folder="first")
    diff.add_argument("second", type=Path, metavar="DIR", help="the other one")
    for part in (list_, verify, show, diff):
        part.add_argument("--json", action="store_true", help="print JSON")
    _add_export(parts)
    import_ = _add(parts, "import", "write a checkpoint of the original DeepSpeed as one of this release")
    import_.add_argument("out", type=Path, metavar="OUT", help="folder of checkpoints that gets it")
    _add_tag(import_)
    return made


def _add_export(parts: Parts) -> None:
    export = _add(parts, "export", "write whole weights to files that others read")
    export.add_argument("out", type=Path, metavar="OUT", help="folder for them")
    _add_tag(export)
    export.add_argument(
        "--format",
        choices=("safetensors", "bin"),
        default="safetensors",
        help="of the files (default: safetensors)",
    )
    export.add_argument(
        "--max_shard_size",
        "--max-shard-size",
        default="5GB",
        metavar="SIZE",
        help="of a file, such as 5GB; the rest goes to the next",
    )
    export.add_argument(
        "--dtype",
        choices=("fp32", "bf16", "fp16"),
        default="fp32",
        help="of the weights, from the masters (default: fp32)",
    )
    export.add_argument(
        "--exclude_frozen_parameters",
        "--exclude-frozen-parameters",
        action="store_true",
        help="leave out weights that are not trained",
    )


def _add(parts: Parts, name: str, text: str, folder: str = "folder") -> argparse.ArgumentParser:
    made = parts.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False)
    made.add_argument(folder, type=Path, metavar="DIR", help="a folder of checkpoints, or one of them")
    return made


def _add_tag(made: argparse._ActionsContainer) -> None:
    made.add_argument("--tag", metavar="TAG", help="which checkpoint (default: the one that latest names)")


if __name__ == "__main__":
    main()
