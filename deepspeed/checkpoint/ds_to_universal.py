"""``python -m deepspeed.checkpoint.ds_to_universal``: nothing needs converting: a checkpoint is checked and copied.

Files are hard links where the file system has them.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from deepspeed.checkpoint import folders
from deepspeed.checkpoint.whole import open_named
from deepspeed.common.commands import run
from deepspeed.errors import UsageError

NO_EFFECT = ("--num_extract_workers", "--num_merge_workers")
NO_EFFECT_FLAGS = ("--keep_temp_folder", "--no_strict", "--inject_missing_state")


def main(args: Sequence[str] | None = None) -> None:
    """Run the command."""
    run("ds_to_universal", _command, args)


def convert(input_folder: Path, output_folder: Path) -> Path:
    """Make a whole checkpoint that is the same as another; return the folder of that one.

    Args:
        input_folder: of a checkpoint, or of several with ``latest``.
        output_folder: of the new one: ``load_checkpoint`` finds it in the folder above, by its name as the tag.

    Raises:
        CheckpointError: a file is missing, cut or damaged.
        UsageError: there is no checkpoint, or the new one would take the place of the old.
    """
    target = Path(os.path.abspath(output_folder))
    save_dir, tag = target.parent, target.name
    with closing(open_named(input_folder)) as reader:
        source = reader.folder.resolve()
        if target.resolve() in (source, *source.parents):
            raise UsageError(
                f"--output_folder: expected another folder than the input and none above it, got {output_folder}"
            )
        if "imported" in reader.manifest.about:
            raise UsageError(
                f"{reader.folder}: written by {reader.manifest.about['imported']}; engine.load_checkpoint imports it "
                "at any world size and stage, and ds_ckpt import writes it as one of this release"
            )
        reader.check()
        aside = folders.begin(save_dir, tag)
        try:
            for entry in reader.manifest.files:
                _link(reader.folder / entry.name, aside / entry.name)
            reader.manifest.about["tag"] = tag
            no_other = not (save_dir / folders.LATEST).exists()
            folders.commit(save_dir, tag, reader.manifest, latest=no_other)
        except OSError:
            folders.give_up(save_dir, tag)
            raise
        return reader.folder


def _link(path: Path, copy: Path) -> None:
    try:
        os.link(path, copy)
    except OSError:  # another file system, or one without links
        shutil.copyfile(path, copy)
        with open(copy, "rb") as file:
            os.fsync(file.fileno())


def _command(args: Sequence[str] | None) -> None:
    asked = parser().parse_args(args)
    source = convert(asked.input_folder, asked.output_folder)
    print(
        f"{source} is whole, and {asked.output_folder} is the same checkpoint; every checkpoint loads at any world "
        "size and stage, so none needs to be converted"
    )


def parser() -> argparse.ArgumentParser:
    """Return the parser."""
    made = argparse.ArgumentParser(
        prog="ds_to_universal",
        description="Check a checkpoint and copy it. Every checkpoint loads at any world size, stage and precision; "
        "this command is for scripts that convert first.",
    )
    made.add_argument("--input_folder", type=Path, required=True, metavar="DIR", help="of a checkpoint")
    made.add_argument("--output_folder", type=Path, required=True, metavar="DIR", help="of the new one")
    for name in NO_EFFECT:
        made.add_argument(name, type=int, metavar="N", help="no effect")
    for name in NO_EFFECT_FLAGS:
        made.add_argument(name, action="store_true", help="no effect")
    return made


if __name__ == "__main__":
    main()
