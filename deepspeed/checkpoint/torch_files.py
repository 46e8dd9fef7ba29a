"""Single torch files, as scripts read and write them through the original's name for it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from deepspeed.checkpoint.unpickling import load_safely


class TorchCheckpointEngine:
    """Read and write one torch file at a time; `config_params` has no effect.

    Checkpoints do not go through it: they need no code from a file. So a script that puts a `load` of its own in its
    place, to allow more classes, changes nothing.
    """

    def __init__(self, config_params: Any = None) -> None:
        del config_params

    def save(self, state_dict: Any, path: str | os.PathLike[str]) -> None:
        """Write plain containers of tensors."""
        torch.save(state_dict, path)

    def load(self, path: str | os.PathLike[str], map_location: torch.device | str | None = None) -> Any:
        """Read what `save` wrote, tensors to `map_location`; none: to the host.

        Raises:
            CheckpointError: the file is missing, damaged, or holds objects of other classes.
        """
        found = load_safely(Path(path), users=True)
        return tree_map_only(Tensor, lambda tensor: tensor.to(map_location or "cpu"), found)
