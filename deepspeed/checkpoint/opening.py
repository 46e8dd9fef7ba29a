"""Open a checkpoint, whoever wrote it."""

from __future__ import annotations

from pathlib import Path

from deepspeed.checkpoint.manifest import NAME
from deepspeed.checkpoint.original import OriginalReader, open_main
from deepspeed.checkpoint.original_files import find_files
from deepspeed.checkpoint.reading import CheckpointReader, Reader


def open_folder(folder: Path, *, states: bool = True) -> Reader:
    """Open a checkpoint of this release, or one that the original DeepSpeed wrote.

    Args:
        folder: of the checkpoint.
        states: whether optimizer states are of interest: those of the original may have no names.

    Raises:
        CheckpointError: there is none, or its files are missing, cut or damaged, or it cannot be imported.
    """
    files = None if (folder / NAME).is_file() else find_files(folder)
    main = None if files is None else open_main(files)
    if files is None or main is None:
        return CheckpointReader(folder)
    return OriginalReader(folder, files, main, states=states)


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder has a checkpoint in it, whoever wrote it."""
    return (folder / NAME).is_file() or find_files(folder) is not None
