"""Saving a model's weights: whole, in their storage dtype, under a name that is complete or absent."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from deepspeed import comm
from deepspeed.checkpoint.utils import clone_tensors_for_torch_save
from deepspeed.zero.gathered import whole_values

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
        state: dict[str, Any] = self.module.state_dict(keep_vars=True)
        if exclude_frozen:
            for name, param in self.module.named_parameters(remove_duplicate=False):
                if not param.requires_grad:
                    state.pop(name, None)
        return whole_values(state, keep=keep)

    def save_16bit_model(
        self,
        save_dir: str | os.PathLike[str],
        save_filename: str = "pytorch_model.bin",
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Write the weights to one file: safetensors if the name ends so, else ``torch.save``.

        Every rank must call it; the first one writes, aside, and renames when the file is complete.

        Returns:
            True: the weights are always complete.
        """
        first = self.data_parallel.rank == 0
        state = self._whole_state(exclude_frozen_parameters, keep=first)
        if state is not None:
            folder = Path(save_dir)
            folder.mkdir(parents=True, exist_ok=True)
            _write(state, folder / save_filename)
        if self.data_parallel.size > 1:
            comm.barrier(group=self.data_parallel.process_group, label="save_16bit_model")
        return True

    save_fp16_model = save_16bit_model


def _write(state: dict[str, Any], path: Path) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        if path.suffix == ".safetensors":
            save_file(_untied(state), aside, metadata={"format": "pt"})
        else:
            torch.save(clone_tensors_for_torch_save(state), aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _untied(state: dict[str, Any]) -> dict[str, Tensor]:
    """Keep one name for tensors that are the same memory: safetensors holds no aliases."""
    seen: dict[tuple[int, torch.Size], str] = {}
    kept = {}
    for name, value in state.items():
        if isinstance(value, Tensor):
            place = (value.data_ptr(), value.shape)
            if value.numel() == 0 or place not in seen:
                seen[place] = name
                kept[name] = clone_tensors_for_torch_save(value).contiguous()
    return kept
