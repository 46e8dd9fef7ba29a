"""The whole weights of a checkpoint, read tensor by tensor from wherever their ranges lie."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from deepspeed.checkpoint import folders
from deepspeed.checkpoint.manifest import MASTER, WEIGHT, Manifest, Value
from deepspeed.checkpoint.opening import is_checkpoint, open_folder
from deepspeed.checkpoint.reading import CheckpointReader, Reader
from deepspeed.checkpoint.records import FileEntry
from deepspeed.checkpoint.weight_files import STEP, Entry, WeightFiles
from deepspeed.errors import UsageError

SHARD = 5 * 10**9
"""Bytes of a file of whole weights at most, as Hugging Face has it."""


class SavedTensor:
    """A tensor of a checkpoint, which is read when asked for.

    Attributes:
        names: all of its names, the first one that of its values.
        shape: of the whole tensor.
        dtype: that it is given in.
    """

    def __init__(self, reader: Reader, names: Sequence[str], value: Value, dtype: torch.dtype) -> None:
        self.names = tuple(names)
        self.shape = torch.Size(value.shape)
        self.dtype = dtype
        self._reader, self._value = reader, value
        self._narrowed = False

    @property
    def nbytes_saved(self) -> int:
        """Bytes of its values in the checkpoint."""
        return self.numel() * self._value.torch_dtype.itemsize

    def numel(self) -> int:
        """Return the number of elements."""
        return self.shape.numel()

    def narrow(self, dtype: torch.dtype) -> None:
        """Let `ranges` give it in a dtype that cannot hold all values; one that is too large is an error then."""
        self._narrowed = dtype != self.dtype
        self.dtype = dtype

    def ranges(self) -> Iterator[Tensor]:
        """Read it a range after the other, flat.

        Raises:
            UsageError: a value is beyond those of the dtype that it is narrowed to.
        """
        for start in range(0, self.numel(), STEP):
            numel = min(STEP, self.numel() - start)
            part = torch.empty(numel, dtype=self._value.torch_dtype if self._narrowed else self.dtype)
            self._reader.read(self._value, start, part)
            yield self._narrow(part) if self._narrowed else part

    def _narrow(self, part: Tensor) -> Tensor:
        made = part.to(self.dtype)
        beyond = part[made.isinf() & part.isfinite()]
        if beyond.numel():
            raise UsageError(
                f"{self.names[0]}: {beyond[0].item():g} is beyond what {self.dtype} holds, at most "
                f"{torch.finfo(self.dtype).max:g} (--dtype): write it as fp32"
            )
        return made

    def contiguous(self) -> Tensor:
        """Read it whole."""
        whole = torch.empty(self.shape, dtype=self.dtype)
        self._reader.read(self._value, 0, whole.view(-1))
        return whole

    def __repr__(self) -> str:
        return f"SavedTensor({self.names[0]}, shape={tuple(self.shape)}, dtype={self.dtype})"


def open_named(checkpoint_dir: Path, tag: str | None = None) -> Reader:
    """Open a checkpoint for reading, whoever wrote it.

    Args:
        checkpoint_dir: folder of checkpoints; without `tag` also the folder of one.
        tag: which one; None: the one that ``latest`` names.

    Raises:
        CheckpointError: a file is missing, cut or damaged.
        UsageError: there is no such checkpoint.
    """
    looked_for = f"tag {tag!r} in {checkpoint_dir}"
    if tag is None:
        tag = folders.read_latest(checkpoint_dir)
        looked_for = f"{checkpoint_dir / folders.LATEST}, which names the newest checkpoint"
        if tag is None and is_checkpoint(checkpoint_dir):
            tag = "."
    found = None if tag is None else folders.find(checkpoint_dir, tag)
    if found is None:
        raise UsageError(
            f"checkpoint_dir: expected a folder of checkpoints, but there is no {looked_for}; "
            f"{folders.way_back(folders.whole_checkpoints(checkpoint_dir), checkpoint_dir)}"
        )
    return open_folder(found, states=False)


def saved_tensors(
    reader: Reader, *, widened: bool, frozen: bool = True
) -> tuple[list[SavedTensor], list[str]]:
    """Return the weights and buffers of a checkpoint, in the order of the model's state dict.

    Args:
        reader: of the checkpoint.
        widened: give masters where there are some, and fp32 where what was stored is narrower; otherwise what was
            stored, of a checkpoint of this release.
        frozen: weights that are not trained, too.

    Returns:
        The tensors, and the names of those that were left out when the checkpoint was saved.
    """
    manifest = reader.manifest
    kinds = (MASTER, WEIGHT) if widened else (WEIGHT, MASTER)
    found, left_out = [], []
    for name, about in manifest.parameters.items():
        if not frozen and not about["trained"] and not about.get("buffer"):
            continue
        values = (manifest.values.get(kind, {}).get(name) for kind in kinds)
        value = next((one for one in values if one is not None), None)
        if value is None:
            left_out.append(name)
            continue
        dtype = value.torch_dtype
        if not widened:
            dtype = getattr(torch, about["dtype"])
        elif dtype.is_floating_point and dtype.itemsize < torch.float32.itemsize:
            dtype = torch.float32
        found.append(SavedTensor(reader, [name, *about["aliases"]], value, dtype))
    return found, left_out


def write_tensors(
    tensors: Sequence[SavedTensor], folder: Path, name: str, max_bytes: int | None
) -> list[FileEntry]:
    """Write tensors of a checkpoint to files others read, a range in memory at a time; see `WeightFiles`."""
    entries = [Entry(tensor.names, tuple(tensor.shape), tensor.dtype) for tensor in tensors]
    files = WeightFiles(folder, name, entries, max_bytes=max_bytes)
    try:
        for tensor in tensors:
            for part in tensor.ranges():
                files.append(tensor.names[0], part)
        return files.finish()
    finally:
        files.abandon()


def add_safetensors(folder: Path, manifest: Manifest) -> None:
    """Write the stored weights of a checkpoint, whose other files are complete, into its folder as safetensors."""
    reader = CheckpointReader(folder, manifest, here=True)
    try:
        tensors, _ = saved_tensors(reader, widened=False)
        manifest.files += write_tensors(tensors, folder, "model.safetensors", SHARD)
    finally:
        reader.close()
