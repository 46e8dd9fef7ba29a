"""A checkpoint of the original DeepSpeed, read as if it were one of ours: by parameter name, range by range.

Every rank opens the files of all ranks, which maps them; values are read when they are needed. Classes of the original
stay what is in the file (`unpickling.Inert`): nothing of it is run or has to be installed.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepspeed.checkpoint.manifest import WEIGHT, Manifest, Value
from deepspeed.checkpoint.original_files import OriginalFiles, named_like
from deepspeed.checkpoint.original_run import OWN_KEYS, about_run, group_options
from deepspeed.checkpoint.original_values import Part, Ranges, read_chunks, read_partitions
from deepspeed.checkpoint.original_whole import read_whole
from deepspeed.checkpoint.reading import Blocks
from deepspeed.checkpoint.records import BLOCK, FileEntry, Progress, unseen
from deepspeed.checkpoint.unpickling import Inert, load_safely
from deepspeed.checkpoint.utils import clone_tensors_for_torch_save
from deepspeed.errors import CheckpointError

CLASSES = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
"""Those of the original that its files hold objects of."""

CUT_KEYS = {"single_partition_of_fp32_groups", "base_optimizer_state", "param_slice_mappings"}
SHARDED_KEYS = {"fp32_flat_groups", "optimizer_state_dict"}
"""What optimizer states have to have at stages 1 and 2, and at stage 3."""


def open_main(files: OriginalFiles) -> dict[str, Any] | None:
    """Return what the main file holds, or None where it is one of ours."""
    main = load_safely(files.main, CLASSES, users=True)
    if not isinstance(main, dict) or not {"module", "dp_world_size"} <= main.keys():
        raise CheckpointError(f"{files.main}: expected the original's 'module' and 'dp_world_size' in it")
    own = main.get("engine")
    return None if isinstance(own, dict) and "client_keys" in own else main


class OriginalReader:
    """A checkpoint of the original that is open for reading.

    Args:
        folder: of the checkpoint.
        files: in it.
        main: what the first of them holds.
        states: whether optimizer states are of interest.

    Attributes:
        progress: is told of bytes that were read.

    Raises:
        CheckpointError: a file is missing or cut, or they do not belong together.
    """

    def __init__(self, folder: Path, files: OriginalFiles, main: dict[str, Any], *, states: bool) -> None:
        self.folder, self._files, self._main = folder, files, main
        self.progress: Progress = unseen
        self._ranks = int(main["dp_world_size"])
        self._check_there()
        self._states = [_states_in(path) for path in files.optimizers]
        self._stage = _stage_of(self._states)
        self._check_counts()
        self._aliases = self._find_aliases()
        self._ranges = Ranges(self._shapes())
        self._trained = [list(names) for names in main.get("param_shapes") or ()]  # by flat
        self._add_states(states=states)
        self._add_weights()
        self.manifest = Manifest(
            self._about(),
            self._parameters(),
            self._ranges.values,
            self._ranges.scalars,
            [FileEntry(path.name, path.stat().st_size, 0, []) for path in self._paths()],
        )
        self.manifest.check_complete()

    # -- what is there ----------------------------------------------------------------------------

    def _paths(self) -> list[Path]:
        return [*self._files.models, *self._files.optimizers]

    def _check_there(self) -> None:
        """Make sure that every rank's files are there, up to their ends."""
        sharded = self._files.sharded
        if not self._files.optimizers and (sharded or self._main.get("param_shapes")):
            raise CheckpointError(f"{self.folder / 'zero_pp_rank_0_mp_rank_00_optim_states.pt'}: missing")
        for paths in (self._files.optimizers, self._files.models if sharded else []):
            if paths and len(paths) < self._ranks:
                raise CheckpointError(f"{named_like(paths[-1], len(paths))}: missing")
            if len(paths) > self._ranks:
                raise CheckpointError(
                    f"{paths[-1]}: {self._files.main.name} is of {self._ranks} ranks; remove the files of another "
                    "checkpoint"
                )
        for path in self._paths():
            if not zipfile.is_zipfile(path):
                raise CheckpointError(f"{path}: cut: it is no whole torch file")

    def _check_counts(self) -> None:
        """Make sure that states were cut for as many ranks as there are."""
        for path, states in zip(self._files.optimizers, self._states, strict=True):
            counts = states.get("partition_count", self._ranks)
            for count in counts if isinstance(counts, (list, tuple)) else [counts]:
                if count != self._ranks:
                    raise CheckpointError(
                        f"{path}: its states are cut for {count} ranks, but the checkpoint is of {self._ranks}; "
                        "what MiCS has written, and files of several checkpoints, cannot be imported"
                    )

    def _tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in self._main["module"].items() if isinstance(value, Tensor)}

    def _shapes(self) -> dict[str, torch.Size]:
        """Return the shape of every tensor, by the first of its names."""
        shapes = {name: value.shape for name, value in self._tensors().items()}
        for group in [*(self._main.get("param_shapes") or ()), self._main.get("frozen_param_shapes") or {}]:
            shapes |= group
        return {name: shape for name, shape in shapes.items() if name not in self._aliases}

    def _find_aliases(self) -> dict[str, str]:
        """Return the further names of tied tensors, each with the first one."""
        shared = self._main.get("shared_params")
        if isinstance(shared, Mapping):
            return dict(shared)
        found, first = {}, dict[Any, str]()
        for name, value in self._tensors().items():
            key = (value.untyped_storage().data_ptr(), value.storage_offset(), value.shape)
            if value.numel() and first.setdefault(key, name) != name:
                found[name] = first[key]
        return found

    def _frozen_left_out(self) -> bool:
        """Whether frozen weights are not in it, or there were none: nothing tells their names."""
        buffers = self._main.get("buffer_names") or ()
        trained = {name for names in self._trained for name in names}
        return bool(trained) and trained.issuperset(self._ranges.shapes.keys() - set(buffers))

    # -- values -----------------------------------------------------------------------------------

    def _add_states(self, *, states: bool) -> None:
        if self._stage == 0:
            if self._main.get("optimizer"):
                buffers = self._main.get("buffer_names") or ()
                weights = {name: value for name, value in self._tensors().items() if name not in buffers}
                self._trained = read_whole(
                    self._ranges,
                    self._files.main,
                    self._main["optimizer"],
                    {name: value for name, value in weights.items() if name not in self._aliases},
                    states=states,
                )
            return
        names = [name for flat in self._trained for name in flat]
        reached: dict[str, int] = {}
        for rank, (path, found) in enumerate(zip(self._files.optimizers, self._states, strict=True)):
            if self._stage == 3:
                read_chunks(self._ranges, path, found, names, Part(rank, self._ranks))
            else:
                read_partitions(self._ranges, path, found, reached)

    def _add_weights(self) -> None:
        ranges = self._ranges
        for name, tensor in self._tensors().items():
            if name in ranges.shapes and tensor.shape == ranges.shapes[name]:
                ranges.add(WEIGHT, name, tensor.shape, 0, tensor)
        frozen = self._main.get("frozen_param_shapes") if self._files.sharded else None
        for rank, path in enumerate(self._files.models if frozen else ()):
            fragments = load_safely(path, CLASSES, users=True)["frozen_param_fragments"]
            for name, fragment in fragments.items():
                start, numel, _ = Part(rank, self._ranks).of(ranges.shapes[name].numel())
                ranges.add(WEIGHT, name, ranges.shapes[name], start, fragment.reshape(-1)[:numel])

    def _about(self) -> dict[str, Any]:
        groups = self._trained
        if self._stage == 3:  # a group has several flats
            flats = [group["params"] for group in self._states[0]["optimizer_state_dict"]["param_groups"]]
            groups = [[name for index in group for name in self._trained[index]] for group in flats]
        if not group_options(self._main, self._states):  # nothing to restore
            groups = []
        return {
            **about_run(self._main, self._states, self._stage),
            "tag": self.folder.name,
            "main": self._files.main.name,
            "groups": groups,
            "frozen_left_out": self._frozen_left_out(),
        }

    def _parameters(self) -> dict[str, dict[str, Any]]:
        trained = {name for names in self._trained for name in names}
        found: dict[str, dict[str, Any]] = {
            name: {"shape": list(shape), "aliases": [], "trained": name in trained}
            for name, shape in self._ranges.shapes.items()
        }
        for name in found.keys() & set(self._main.get("buffer_names") or ()):
            found[name]["buffer"] = True
        for alias, name in self._aliases.items():
            found[name]["aliases"].append(alias)
        return found

    # -- reading ----------------------------------------------------------------------------------

    def read(self, value: Value, start: int, out: Tensor) -> None:
        """Fill `out` (flat, any dtype and device) with a value's elements from `start` on."""
        for place, low, high in value.overlaps(start, start + out.numel()):
            part = self._ranges.tensors[place.record][low - place.start : high - place.start]
            out[low - start : high - start].copy_(part)
            self.progress(part.nbytes)

    ask = read

    def settle(self) -> None:
        """Do nothing: all is read when it is asked for."""

    def structure(self, name: str) -> Any:
        """Return what the main file holds beside values, as ours have it."""
        assert name == self._files.main.name
        client = {key: value for key, value in self._main.items() if key not in OWN_KEYS}
        if "engine" in client:
            raise CheckpointError(
                f"{self._files.main}: its client_state has a key 'engine', which is ours; rename it"
            )
        return {
            **clone_tensors_for_torch_save(client),
            "module": {
                name: value for name, value in self._main["module"].items() if not isinstance(value, Tensor)
            },
            "lr_scheduler": self._main.get("lr_scheduler"),
            "engine": {
                "client_keys": list(client),
                "client_types": [],
                "schedule_types": [],
                "param_groups": group_options(self._main, self._states),
                "group_types": [],
            },
        }

    def checked(self) -> Blocks:
        """Return nothing: a file's own checksums are compared in one go."""
        return {}

    def check(self, rank: int = 0, ranks: int = 1, checked: Sequence[Blocks] = ()) -> None:
        """Compare one rank's share of the files with the checksums in them."""
        for path in self._paths()[rank::ranks]:
            for damage in damages_in(path):
                raise CheckpointError(damage)

    def close(self) -> None:
        """Do nothing: no file is open, and what is mapped goes with what uses it."""


def damages_in(path: Path) -> Iterator[str]:
    """Compare a torch file with the checksums in it; say what of it is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if not _is_whole(archive, info):
                    yield f"{path}: damaged: {info.filename} in it is not what was written"
    except (zipfile.BadZipFile, OSError) as error:
        yield f"{path}: cut or damaged: {error}"


def _is_whole(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bool:
    try:
        with archive.open(info) as member:
            while member.read(BLOCK):
                pass
    except (zipfile.BadZipFile, EOFError):
        return False
    return True


def _states_in(path: Path) -> dict[str, Any]:
    found = load_safely(path, CLASSES, users=True)
    states = found.get("optimizer_state_dict") if isinstance(found, dict) else None
    if not isinstance(states, dict):
        raise CheckpointError(f"{path}: expected the original's 'optimizer_state_dict' in it")
    missing = (SHARDED_KEYS if SHARDED_KEYS & states.keys() else CUT_KEYS) - states.keys()
    if missing:
        raise CheckpointError(
            f"{path}: expected {min(missing)!r} in it, as release 0.19 of the original writes it; load it there, and "
            "save it again"
        )
    return states


def _stage_of(states: list[dict[str, Any]]) -> int:
    if not states:
        return 0
    if "fp32_flat_groups" in states[0]:
        return 3
    stage = states[0].get("zero_stage")
    return int(stage.args[0]) if isinstance(stage, Inert) else 1
