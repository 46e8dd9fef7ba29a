"""The whole fp32 weights of a checkpoint: as a state dict, in a model, or in files.

Masters give the weights where there are some; other weights are widened, exactly.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TypeVar

from torch import Tensor, nn

from deepspeed.checkpoint import folders
from deepspeed.checkpoint.reading import Reader
from deepspeed.checkpoint.restoring import Restorer
from deepspeed.checkpoint.script import SCRIPT
from deepspeed.checkpoint.weight_files import size_in_bytes
from deepspeed.checkpoint.whole import SavedTensor, open_named, saved_tensors, write_tensors
from deepspeed.common.commands import run
from deepspeed.common.logging import announce, logger, set_log_level
from deepspeed.common.progress import ByteBar
from deepspeed.errors import CheckpointError, UsageError
from deepspeed.zero.slot import is_zero_param

Model = TypeVar("Model", bound=nn.Module)
Folder = str | os.PathLike[str]


def get_fp32_state_dict_from_zero_checkpoint(
    checkpoint_dir: Folder,
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
    lazy_mode: bool = False,
) -> dict[str, Tensor] | dict[str, SavedTensor]:
    """Return a checkpoint's whole weights and buffers in fp32, in host memory, whatever wrote it.

    Args:
        checkpoint_dir: folder of checkpoints.
        tag: which one; None: the one that ``latest`` names.
        exclude_frozen_parameters: leave out weights that are not trained.
        lazy_mode: read nothing yet: each value has ``shape``, ``dtype`` and ``contiguous()``, which gives the
            tensor.

    Returns:
        By name; a tied tensor is the same object under all of its names. What is no floating-point number keeps
        its dtype.

    Raises:
        CheckpointError: a file is missing, cut or damaged.
        UsageError: there is no such checkpoint, or weights were left out of it.
    """
    reader = open_named(Path(checkpoint_dir), tag)
    tensors = whole_weights(reader, exclude_frozen=exclude_frozen_parameters)
    if lazy_mode:
        return {name: tensor for tensor in tensors for name in tensor.names}
    with closing(reader):
        state: dict[str, Tensor] = {}
        for tensor in tensors:
            state.update(dict.fromkeys(tensor.names, tensor.contiguous()))
        return state


def convert_zero_checkpoint_to_fp32_state_dict(
    checkpoint_dir: Folder,
    output_dir: Folder,
    max_shard_size: int | str | None = "5GB",
    safe_serialization: bool = False,
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
) -> None:
    """Write a checkpoint's whole weights and buffers in fp32 to files that ``from_pretrained`` reads.

    Only a range of one tensor is in memory at a time.

    Args:
        checkpoint_dir: folder of checkpoints.
        output_dir: gets ``pytorch_model.bin`` or ``model.safetensors``, or several with an index.
        max_shard_size: of a file: bytes or text such as ``5GB``; None: one file.
        safe_serialization: write safetensors, which hold a tied tensor under its first name only.
        tag: which checkpoint; None: the one that ``latest`` names.
        exclude_frozen_parameters: leave out weights that are not trained.

    Raises:
        CheckpointError: a file is missing, cut or damaged.
        UsageError: there is no such checkpoint, or weights were left out of it.
    """
    max_bytes = size_in_bytes(max_shard_size)
    name = "model.safetensors" if safe_serialization else "pytorch_model.bin"
    with closing(open_named(Path(checkpoint_dir), tag)) as reader, ByteBar(f"writing {output_dir}") as bar:
        tensors = whole_weights(reader, exclude_frozen=exclude_frozen_parameters)
        for tensor in tensors:
            logger.debug("%s", tensor)
            bar.expect(tensor.nbytes_saved)
        reader.progress = bar.advance
        for entry in write_tensors(tensors, Path(output_dir), name, max_bytes):
            logger.info("wrote %s, %d bytes", Path(output_dir) / entry.name, entry.size)


def load_state_dict_from_zero_checkpoint(
    model: Model, checkpoint_dir: Folder, tag: str | None = None
) -> Model:
    """Load a checkpoint's weights into a model that no engine has, in place, and return it, on the CPU.

    Args:
        model: its parameters may have any dtype; values are read into them one after the other.
        checkpoint_dir: folder of checkpoints.
        tag: which one; None: the one that ``latest`` names.

    Raises:
        CheckpointError: a file is missing, cut or damaged.
        UsageError: a shape differs, there is no such checkpoint, or an engine has the model.
    """
    taken = next((name for name, param in model.named_parameters() if is_zero_param(param)), None)
    if taken is not None:
        raise UsageError(
            f"model: {taken} belongs to an engine or zero.Init; load with engine.load_checkpoint(..., "
            "load_module_only=True)"
        )
    model.cpu()
    with closing(open_named(Path(checkpoint_dir), tag)) as reader:
        restorer = Restorer(reader, model)
        restorer.restore([], None, states=False)
        if restorer.failure is not None:
            raise restorer.failure
        _report(restorer, reader)
    return model


def whole_weights(reader: Reader, *, exclude_frozen: bool) -> list[SavedTensor]:
    """Return the weights and buffers of an open checkpoint, to be read as fp32.

    Raises:
        UsageError: weights were left out of it.
    """
    tensors, left_out = saved_tensors(reader, widened=True, frozen=not exclude_frozen)
    if left_out:
        raise UsageError(
            f"{reader.folder}: {_and_more(left_out)} not in it: it was saved with exclude_frozen_parameters=True; "
            "exclude_frozen_parameters=True (--exclude_frozen_parameters) gives the others, "
            "load_state_dict_from_zero_checkpoint loads them into a model that has the frozen ones"
        )
    return tensors


def _report(restorer: Restorer, reader: Reader) -> None:
    """Say which weights of the model stay as they are."""
    _, left_out = saved_tensors(reader, widened=True)
    complaint = restorer.fit.complaint()
    if left_out:
        announce(f"{reader.folder}: {_and_more(left_out)} not in it; the model's own stay")
    if complaint:
        announce(f"{reader.folder}: {complaint}; the others are loaded")


def _and_more(names: list[str]) -> str:
    return f"{names[0]} is" if len(names) == 1 else f"{names[0]} and {len(names) - 1} more are"


def get_optim_files(checkpoint_dir: Folder) -> list[str]:
    """Return the paths of a checkpoint's files with optimizer states, in the order of ranks.

    Args:
        checkpoint_dir: folder of the checkpoint itself.
    """
    found = [str(path) for path in Path(checkpoint_dir).glob("*_optim_states.pt")]
    if not found:
        raise CheckpointError(f"{checkpoint_dir}: there is no *_optim_states.pt in it")
    return sorted(found, key=lambda path: [int(number) for number in re.findall(r"\d+", Path(path).name)])


def get_model_state_file(checkpoint_dir: Folder, zero_stage: int) -> str:
    """Return the path of a checkpoint's file with the weights and the client state.

    Args:
        checkpoint_dir: folder of the checkpoint itself.
        zero_stage: that it was saved at.
    """
    path = Path(checkpoint_dir) / folders.model_file(0, sharded=zero_stage == 3)
    if not path.is_file():
        raise CheckpointError(f"{path}: missing")
    return str(path)


def main(args: Sequence[str] | None = None) -> None:
    """Run the script."""
    run(SCRIPT, _command, args)


def _command(args: Sequence[str] | None) -> None:
    asked = parser().parse_args(args)
    if asked.debug:
        set_log_level("debug")
    convert_zero_checkpoint_to_fp32_state_dict(
        asked.checkpoint_dir,
        asked.output_dir,
        max_shard_size=asked.max_shard_size,
        safe_serialization=asked.safe_serialization,
        tag=asked.tag,
        exclude_frozen_parameters=asked.exclude_frozen_parameters,
    )
    print(f"wrote fp32 weights to {asked.output_dir}")


def parser() -> argparse.ArgumentParser:
    """Return the parser."""
    made = argparse.ArgumentParser(
        prog=SCRIPT,
        description="Write the whole fp32 weights of a checkpoint to pytorch_model.bin or model.safetensors.",
    )
    made.add_argument("checkpoint_dir", help="folder of checkpoints, such as the one this script is in")
    made.add_argument("output_dir", help="folder for the weights")
    made.add_argument(
        "--max_shard_size",
        default="5GB",
        metavar="SIZE",
        help="of a file, such as 5GB; the rest goes to the next",
    )
    made.add_argument("--safe_serialization", action="store_true", help="write safetensors")
    made.add_argument("-t", "--tag", help="which checkpoint; by default the one that latest names")
    made.add_argument(
        "--exclude_frozen_parameters", action="store_true", help="leave out weights that are not trained"
    )
    made.add_argument("-d", "--debug", action="store_true", help="show more of what happens")
    return made
