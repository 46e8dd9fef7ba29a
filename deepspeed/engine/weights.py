"""Saving a model's weights: whole, in their storage dtype, under a name that is complete or absent."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from deepspeed.checkpoint.weight_files import Entry, WeightFiles, size_in_bytes
from deepspeed.comm.agreement import raise_together
from deepspeed.errors import CheckpointError, DeepSpeedError
from deepspeed.zero.gathered import whole_values
from deepspeed.zero.slot import is_zero_param

if TYPE_CHECKING:
    from deepspeed.zero.stage import RankGroup


class WeightSaving(nn.Module):
    """The part of the engine that hands out and saves whole weights."""

    module: nn.Module
    data_parallel: RankGroup
    zero_optimization_partition_weights: Callable[[], bool]

    def module_state_dict(self, exclude_frozen_parameters: bool = False) -> dict[str, Any]:
        """Return the module's state dict with whole weights, without frozen parameters if asked.

        At stage 3 every rank must call it, and the weights are copies in host memory.
        """
        state = self._whole_state(exclude_frozen_parameters, keep=True)
        assert state is not None  # it was kept
        return state

    def _zero3_consolidated_16bit_state_dict(
        self, exclude_frozen_parameters: bool = False
    ) -> dict[str, Any] | None:
        """Return whole weights in host memory on the first rank, None elsewhere; every rank must call it.

        Raises:
            ValueError: parameters are not sharded.
        """
        if not self.zero_optimization_partition_weights():
            raise ValueError(
                "zero_optimization.stage: expected 3 for consolidated weights; below it module.state_dict() has them"
            )
        return self._whole_state(exclude_frozen_parameters, keep=self.data_parallel.rank == 0)

    _consolidated_16bit_state_dict = _zero3_consolidated_16bit_state_dict

    def _whole_state(self, exclude_frozen: bool, *, keep: bool) -> dict[str, Any] | None:
        return whole_values(self._named_state(exclude_frozen), keep=keep)

    def _named_state(self, exclude_frozen: bool) -> dict[str, Any]:
        """Return the module's state dict with the parameters themselves."""
        state: dict[str, Any] = self.module.state_dict(keep_vars=True)
        if exclude_frozen:
            for name, param in self.module.named_parameters(remove_duplicate=False):
                if not param.requires_grad:
                    state.pop(name, None)
        return state

    def save_16bit_model(
        self,
        save_dir: str | os.PathLike[str],
        save_filename: str = "pytorch_model.bin",
        exclude_frozen_parameters: bool = False,
        max_shard_size: int | str | None = None,
    ) -> bool:
        """Write whole weights: safetensors if the name ends so, else ``torch.save``'s format.

        Every rank must call it; the first one writes, aside, one tensor after the other, and renames when all is
        complete. A tied tensor is in safetensors under its first name only.

        Args:
            save_dir: folder, which is made.
            save_filename: of the file; where one is not enough, ``-00001-of-0000N`` is added, and an index.
            exclude_frozen_parameters: leave out weights that are not trained.
            max_shard_size: of a file: bytes or text such as ``5GB``; None: one file.

        Returns:
            True: the weights are always complete.

        Raises:
            CheckpointError: they cannot be written; on every rank.
        """
        max_bytes = size_in_bytes(max_shard_size)
        state = self._named_state(exclude_frozen_parameters)
        first = self.data_parallel.rank == 0
        writing = _Writing(Path(save_dir), save_filename, state, max_bytes) if first else None
        for names in _tied(state):
            keep = writing is not None and writing.error is None
            whole = whole_values({names[0]: state[names[0]]}, keep=keep)
            if writing is not None and whole is not None:
                writing.attempt(partial(writing.append, names[0], whole[names[0]]))
        if writing is not None:
            writing.end()
        error = writing.error if writing is not None else None
        raise_together(error, self.data_parallel.process_group, label="save_16bit_model")
        return True

    save_fp16_model = save_16bit_model


class _Writing:
    """The first rank's writing; once it has failed nothing more is written, but the others are not left waiting."""

    def __init__(self, folder: Path, name: str, state: dict[str, Any], max_bytes: int | None) -> None:
        self.error: DeepSpeedError | None = None
        self._files: WeightFiles | None = None
        self.attempt(lambda: self._begin(folder, name, state, max_bytes))

    def _begin(self, folder: Path, name: str, state: dict[str, Any], max_bytes: int | None) -> None:
        entries = [
            Entry(tuple(names), tuple(state[names[0]].shape), state[names[0]].dtype) for names in _tied(state)
        ]
        more = {name: value for name, value in state.items() if not isinstance(value, Tensor)}
        self._files = WeightFiles(folder, name, entries, max_bytes=max_bytes, more=more)

    def append(self, name: str, values: Tensor) -> None:
        """Write a tensor."""
        assert self._files is not None
        self._files.append(name, values)

    def end(self) -> None:
        """Put everything in its place, or remove it."""
        if self._files is not None:
            self.attempt(self._files.finish)
            self._files.abandon()

    def attempt(self, action: Callable[[], Any]) -> None:
        """Do something unless something failed before."""
        if self.error is not None:
            return
        try:
            action()
        except DeepSpeedError as error:
            self.error = error
        except Exception as error:
            self.error = CheckpointError(f"save_16bit_model: {type(error).__name__}: {error}")
            self.error.__cause__ = error


def _tied(state: dict[str, Any]) -> list[list[str]]:
    """Group the names of a state dict's tensors, each with the other names of the same one."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, value in state.items():
        if isinstance(value, Tensor):
            known = not is_zero_param(value) and value.numel()  # released parameters have no memory
            place = (value.data_ptr(), *value.shape, -1, *value.stride()) if known else (id(value),)
            groups.setdefault(place, []).append(name)
    return list(groups.values())
