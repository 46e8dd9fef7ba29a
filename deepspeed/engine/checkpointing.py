"""save_checkpoint and load_checkpoint: what all ranks do together, and what of the engine goes in and out.

    save   agree on the tag -> every rank writes its files aside -> the first one commits
    load   agree on the folder -> every rank checks it -> values go to where this engine has them -> counters

An error of one rank is raised on all of them, before anything is committed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from deepspeed.checkpoint import folders
from deepspeed.checkpoint.contents import (
    OptimizerContents,
    describe,
    main_contents,
    names_of,
    nbytes_of,
    plan_weights,
)
from deepspeed.checkpoint.manifest import COUNTERS, Manifest
from deepspeed.checkpoint.opening import open_folder
from deepspeed.checkpoint.plain import from_plain, to_plain
from deepspeed.checkpoint.reading import Reader
from deepspeed.checkpoint.records import RecordWriter
from deepspeed.checkpoint.restoring import Restorer
from deepspeed.checkpoint.saving import Commit, Save
from deepspeed.comm.agreement import raise_together
from deepspeed.common.logging import announce, logger, warn_once
from deepspeed.common.memory import collector_paused
from deepspeed.common.progress import ByteBar
from deepspeed.engine.randomness import random_states, set_random_states
from deepspeed.errors import CheckpointError, DeepSpeedError, UsageError
from deepspeed.ops.probe import state_keys
from deepspeed.version import __version__
from deepspeed.zero.gathered import GatheredParameters

if TYPE_CHECKING:
    from deepspeed.config import DeepSpeedConfig
    from deepspeed.precision.policy import PrecisionPolicy
    from deepspeed.zero.gatherer import Gatherer
    from deepspeed.zero.optimizer import ZeroOptimizer
    from deepspeed.zero.reducer import Reducer
    from deepspeed.zero.stage import RankGroup
    from deepspeed.zero.unit import Unit

Result = TypeVar("Result")

OWN_KEYS = {
    *("module", "buffer_names", "optimizer", "param_shapes", "shared_params", "lr_scheduler", "data_sampler"),
    *("sparse_tensor_module_names", "frozen_param_shapes", "frozen_param_fragments", "random_ltd", "engine"),
    *("dp_world_size", "mp_world_size", "ds_config", "ds_version", *COUNTERS),
}
"""Keys of the file with the weights that are not for the user's state."""


@dataclass(frozen=True)
class Wanted:
    """What `load_checkpoint` is to restore."""

    strict: bool
    optimizer: bool
    schedule: bool
    module_only: bool
    custom: Callable[..., Any] | None


class Checkpointing(nn.Module):
    """The part of the engine that saves and resumes training."""

    module: nn.Module
    settings: DeepSpeedConfig
    policy: PrecisionPolicy
    data_parallel: RankGroup
    lr_scheduler: Any
    training_dataloader: Any
    global_steps: int
    micro_steps: int
    global_samples: int
    skipped_steps: int
    _zero: ZeroOptimizer | None
    _reducer: Reducer | None
    _gatherer: Gatherer | None
    _units: list[Unit]
    _micro_batches: int
    _accumulating: bool
    _saving: Save | None = None

    # -- saving -----------------------------------------------------------------------------------

    @collector_paused()
    def save_checkpoint(
        self,
        save_dir: str | os.PathLike[str],
        tag: str | None = None,
        client_state: dict[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Save everything that training needs to go on as if it had not stopped; every rank must call it.

        Args:
            save_dir: folder of checkpoints, which all ranks reach.
            tag: name of this one; None: ``global_stepN``. One of the same name is replaced.
            client_state: the first rank's is saved, and handed back by `load_checkpoint`: plain data, tensors,
                numpy arrays, ``argparse.Namespace``.
            save_latest: let ``latest`` name it.
            exclude_frozen_parameters: leave out weights that are not trained.

        Returns:
            True: a save that failed raises, on every rank, and leaves the checkpoints that were there.

        Raises:
            CheckpointError: the files cannot be written.
            UsageError: `client_state` holds something else, or ranks disagree on the tag and it matters.
        """
        begun, folder = time.perf_counter(), Path(save_dir)
        self.finish_saving()
        tag = self._agreed_tag(
            "save_checkpoint", f"global_step{self.global_steps}" if tag is None else str(tag)
        )
        tag = folders.checked_tag(tag)
        self._together("save_checkpoint", lambda: self._begin_saving(folder, tag))
        bar = ByteBar(f"saving {folder / tag}", shown=self.data_parallel.rank == 0 and not self._saves_later)
        save = self._together(
            "save_checkpoint", lambda: self._save_of(folder, tag, save_latest, exclude_frozen_parameters, bar)
        )

        def finished() -> None:
            logger.info("saved %s in %.1f s", folder / tag, time.perf_counter() - begun)

        try:
            with bar:
                weights = self._together(
                    "save_checkpoint", lambda: self._give_values(save, client_state or {})
                )
                if self._saves_later:
                    self._saving = save
                    if self._zero is not None:
                        self._zero.states.before_change = save.secure
                    save.start(finished, weights)
                    return True
                self._together("save_checkpoint", save.write)
                self._together("save_checkpoint", save.finish)
        except DeepSpeedError:
            save.abandon()
            raise
        finished()
        return True

    def finish_saving(self) -> None:
        """Wait until a checkpoint that is being saved while training goes on is there; every rank must call it.

        Raises:
            CheckpointError: it could not be saved.
        """
        save, self._saving = self._saving, None
        if save is not None:
            raise_together(save.wait(), self.data_parallel.process_group, label="finish_saving")

    @property
    def _saves_later(self) -> bool:
        writer = self.settings.checkpoint.writer
        return writer is not None and writer.decoupled

    def _begin_saving(self, folder: Path, tag: str) -> None:
        self._check_present("save_checkpoint")
        if self._micro_batches:
            warn_once(
                f"save_checkpoint: gradients of {self._micro_batches} micro-batches since the last update are not "
                "saved; save after an update to resume exactly"
            )
        for unit in self._units:
            unit.adopt_edits()
            unit.held.drain()
        if self.data_parallel.rank == 0:
            folders.begin(folder, tag)

    def _save_of(self, folder: Path, tag: str, latest: bool, exclude_frozen: bool, bar: ByteBar) -> Save:
        """Plan this rank's part of a save."""
        commit = None
        if self.data_parallel.rank == 0:
            _, left_out = self._state_to_save(exclude_frozen)
            parameters = describe(self.module, self.module.state_dict(keep_vars=True), left_out)
            manifest = Manifest(self._about(tag, exclude_frozen), parameters)
            keys = self.settings.checkpoint
            commit = Commit(manifest, self.data_parallel.size, latest, keys.keep_last, keys.save_safetensors)
        return Save(folder, tag, self.data_parallel.rank, exclude_frozen, self._group_names(), bar, commit)

    def _give_values(self, save: Save, client_state: dict[str, Any]) -> RecordWriter | None:
        """Give a save what this rank writes; what is on disk is written at once, the rest now or later.

        Returns:
            The file with weights, which may change at any time.
        """
        main = None
        rank, sharded = self.data_parallel.rank, self._stage == 3
        state, _ = self._state_to_save(save.exclude_frozen)
        weights = plan_weights(state, self._units, names_of(self.module, state), first=rank == 0)
        states = OptimizerContents(self._zero)
        save.bar.expect(nbytes_of(weights.parts) + nbytes_of(states.parts))
        extra = self._main_contents(client_state, state)
        if rank == 0 or sharded:
            structure: dict[str, Any] = {
                "module": {**(_not_tensors(state) if rank == 0 else {}), **weights.module},
                **(extra if rank == 0 else {}),
            }
            later = self._saves_later and not any(unit.held.nbytes_on_disk for unit in self._units)
            name = folders.model_file(rank, sharded=sharded)
            main = save.add_file(name, structure, weights.parts, later=later)
            weights.write(main)
        plain, types = to_plain(random_states(), "random states")
        structure = {
            "optimizer_state_dict": {"zero_stage": self._stage, **states.structure()},
            "rng": {"states": plain, "types": types},
            "ds_version": __version__,
        }
        later = self._saves_later and not (self._zero is not None and self._zero.states.are_away)
        name = folders.optimizer_file(rank, bf16=self.policy.storage is torch.bfloat16)
        states.write(save.add_file(name, structure, states.parts, later=later))
        save.scalars.update(states.scalars)
        return main

    def _state_to_save(self, exclude_frozen: bool) -> tuple[dict[str, Any], set[str]]:
        """Return the module's state dict with the parameters themselves, and the names that are left out of it."""
        state: dict[str, Any] = self.module.state_dict(keep_vars=True)
        left_out = set()
        for name, param in self.module.named_parameters(remove_duplicate=False) if exclude_frozen else ():
            if not param.requires_grad and state.pop(name, None) is not None:
                left_out.add(name)
        return state, left_out

    def _main_contents(self, client_state: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
        """Return what the first rank's file holds beside the weights."""
        if not isinstance(client_state, dict):
            raise UsageError(f"client_state: expected a dict, got a {type(client_state).__name__}")
        taken = sorted(str(key) for key in OWN_KEYS & client_state.keys())
        if taken:
            raise UsageError(f"client_state: {taken[0]!r} is a key of the checkpoint itself; use another one")
        has_schedule = hasattr(self.lr_scheduler, "state_dict")
        return main_contents(
            client_state,
            self.lr_scheduler.state_dict() if has_schedule else None,
            self._group_options(),
            buffers=[name for name, _ in self.module.named_buffers() if name in state],
            ranks=self.data_parallel.size,
            counters={name: getattr(self, name) for name in COUNTERS},
        )

    def _group_options(self) -> list[dict[str, Any]]:
        groups = [] if self._zero is None else self._zero.param_groups
        return [{key: value for key, value in group.items() if key != "params"} for group in groups]

    def _about(self, tag: str, exclude_frozen: bool) -> dict[str, Any]:
        loader = self.training_dataloader
        return {
            "tag": tag,
            "optimizer": type(self._zero.optimizer).__name__ if self._zero else None,
            "stage": self._stage,
            "world_size": self.data_parallel.size,
            "ds_version": __version__,
            **{name: getattr(self, name) for name in COUNTERS},
            "loss_scaler": self._zero.loss_scaler.state_dict()
            if self._zero and self.policy.loss_scaled
            else None,
            "data": loader.state_dict() if loader is not None else None,
            "frozen_left_out": exclude_frozen,
            "main": folders.model_file(0, sharded=self._stage == 3),
            "optimizer_files": [
                folders.optimizer_file(rank, bf16=self.policy.storage is torch.bfloat16)
                for rank in range(self.data_parallel.size)
            ],
        }

    # -- loading ----------------------------------------------------------------------------------

    @collector_paused()
    def load_checkpoint(
        self,
        load_dir: str | os.PathLike[str],
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Callable[..., Any] | None = None,
    ) -> tuple[str | None, dict[str, Any] | None]:
        """Resume from a checkpoint, whatever world size, stage, precision or tier wrote it; every rank must call it.

        Args:
            load_dir: folder of checkpoints.
            tag: which one; None: the one that ``latest`` names.
            load_module_strict: names of weights that do not fit are an error; otherwise they are reported.
            load_optimizer_states: restore the optimizer's states and options and the loss scale.
            load_lr_scheduler_states: restore the schedule.
            load_module_only: restore nothing but weights and buffers.
            custom_load_fn: called with ``src`` (whole weights by name) and ``dst`` (the module, whole) after the
                weights whose names and shapes fit were loaded, to load the others.

        Returns:
            The checkpoint's folder and its client state; (None, None), with a warning, where there is none.

        Raises:
            CheckpointError: a file is missing, cut or damaged; the newest whole checkpoint is named.
            UsageError: the checkpoint is of another model.
        """
        wanted = Wanted(
            load_module_strict,
            load_optimizer_states,
            load_lr_scheduler_states,
            load_module_only,
            custom_load_fn,
        )
        folder = Path(load_dir)
        self.finish_saving()
        tag = None if tag is None else self._agreed_tag("load_checkpoint", str(tag))
        self._together("load_checkpoint", lambda: self._check_present("load_checkpoint"))
        failed: list[str] = []
        while True:
            found: Path | None = None
            try:
                found = self._located(folder, tag)
                return (None, None) if found is None else self._load_one(found, wanted)
            except CheckpointError as error:
                failed.append(found.name if found is not None else str(tag))
                tag = self._next_tag(folder, failed, error)

    def _next_tag(self, folder: Path, failed: list[str], error: CheckpointError) -> str:
        """Return the checkpoint to fall back to; raise the error where that is not asked for, or there is none."""
        whole = [one for one in folders.whole_checkpoints(folder) if one not in failed]
        if not self.settings.checkpoint.load_fallback or not whole:
            raise CheckpointError(f"{error}; {folders.way_back(whole, folder)}") from error
        announce(f"load_checkpoint: {error}; loading tag={whole[0]!r} instead (checkpoint.load_fallback)")
        return whole[0]

    def _load_one(self, found: Path, wanted: Wanted) -> tuple[str, dict[str, Any]]:
        begun = time.perf_counter()
        states = wanted.optimizer and not wanted.module_only
        reader = self._together("load_checkpoint", lambda: open_folder(found, states=states))
        bar = ByteBar(f"loading {found}", self._share_of(reader), shown=self.data_parallel.rank == 0)
        reader.progress = bar.advance
        try:
            with bar:
                restorer = self._together("load_checkpoint", lambda: self._fitting(reader, wanted))
                main = self._together(
                    "load_checkpoint", lambda: reader.structure(reader.manifest.about["main"])
                )
                self._restore(restorer, reader, main, wanted)
        finally:
            reader.close()
        if "imported" in reader.manifest.about:
            announce(
                f"load_checkpoint: {found}: imported a checkpoint of {reader.manifest.about['imported']}"
            )
        logger.info("loaded %s in %.1f s", found, time.perf_counter() - begun)
        own = main["engine"]
        return str(found), from_plain({key: main[key] for key in own["client_keys"]}, own["client_types"])

    def _share_of(self, reader: Reader) -> int:
        """Return about how many bytes this rank will read."""
        shards = max((unit.sharding.shard_group.size for unit in self._units), default=1)
        return sum(entry.size for entry in reader.manifest.files) // shards

    def _located(self, load_dir: Path, tag: str | None) -> Path | None:
        """Return the folder that the first rank finds."""
        first = self.data_parallel.rank == 0
        found = self._together("load_checkpoint", lambda: self._locate(load_dir, tag) if first else None)
        path: Path | None = self._all(found)[0]
        return path

    def _locate(self, load_dir: Path, tag: str | None) -> Path | None:
        """Find the folder; None, having said so, where there is none."""
        looked_for = f"tag {tag!r} in {load_dir}"
        if tag is None:
            tag = folders.read_latest(load_dir)
            looked_for = f"{load_dir / folders.LATEST}, which names the newest checkpoint"
        found = None if tag is None else folders.find(load_dir, tag)
        if found is None:
            if self.settings.checkpoint.load_missing == "error":
                raise UsageError(f"load_checkpoint: there is no {looked_for}")
            announce(f"load_checkpoint: nothing was loaded: there is no {looked_for}")
        return found

    def _fitting(self, reader: Reader, wanted: Wanted) -> Restorer:
        """Match names; refuse what does not fit before anything is changed."""
        restorer = Restorer(reader, self.module, reshaped=wanted.custom is not None)
        complaint = restorer.fit.complaint()
        if complaint and wanted.custom is None:
            if wanted.strict:
                raise UsageError(
                    f"{reader.folder}: the weights do not fit the model: {complaint}; load_module_strict=False "
                    "loads those that fit"
                )
            announce(f"load_checkpoint: {reader.folder}: {complaint}; the others are loaded")
        if wanted.optimizer and not wanted.module_only and self._zero is not None:
            self._check_optimizer(self._zero.optimizer, reader)
        return restorer

    def _check_optimizer(self, optimizer: torch.optim.Optimizer, reader: Reader) -> None:
        """Refuse states that an optimizer of another kind has made."""
        made_by, name = reader.manifest.about.get("optimizer"), type(optimizer).__name__
        saved = reader.manifest.state_keys()
        if made_by in (None, name) or not saved:
            return
        expected = state_keys(optimizer)
        if saved != expected:
            keys = "" if expected is None else f" ({', '.join(sorted(expected)) or 'none'})"
            raise UsageError(
                f"{reader.folder}: optimizer: expected states of {name}{keys}, got those of {made_by} "
                f"({', '.join(sorted(saved))}); load_optimizer_states=False loads the rest"
            )

    def _restore(self, restorer: Restorer, reader: Reader, main: dict[str, Any], wanted: Wanted) -> None:
        if self._reducer is not None:
            self._reducer.recover()
            self._reducer.clear()
        if self._gatherer is not None:
            self._gatherer.end_step()
        for unit in self._units:
            unit.adopt_edits()
        states = wanted.optimizer and not wanted.module_only
        restorer.restore(self._units, self._zero, states=states)
        self._restore_extra_state(main["module"])
        self._together("load_checkpoint", lambda: _raise(restorer.failure))
        if wanted.custom is not None:
            whole = restorer.whole()
            self._together("load_checkpoint", lambda: _raise(restorer.failure))
            self._load_custom(wanted.custom, whole)
        if wanted.module_only:
            return
        self._micro_batches, self._accumulating = 0, False
        for name in COUNTERS:
            setattr(self, name, reader.manifest.about[name])
        if states:
            self._restore_optimizer(restorer, reader.manifest, main)
        if wanted.schedule and self.lr_scheduler is not None and main["lr_scheduler"] is not None:
            self.lr_scheduler.load_state_dict(
                from_plain(main["lr_scheduler"], main["engine"]["schedule_types"])
            )
        if self.training_dataloader is not None and reader.manifest.about["data"] is not None:
            self.training_dataloader.load_state_dict(reader.manifest.about["data"])
        self._together("load_checkpoint", lambda: self._restore_randomness(reader))
        ranks, checked = self.data_parallel, self._all(reader.checked())
        self._together("load_checkpoint", lambda: reader.check(ranks.rank, ranks.size, checked))

    def _load_custom(self, load: Callable[..., Any], whole: dict[str, Any]) -> None:
        """Call the user's function on every rank; an error of one is raised on all."""
        error: UsageError | None = None
        with GatheredParameters(list(self.module.parameters()), modifier_rank=0):
            try:
                load(src=whole, dst=self.module)
            except Exception as caught:
                error = UsageError(f"custom_load_fn: {type(caught).__name__}: {caught}")
                error.__cause__ = caught
        raise_together(error, self.data_parallel.process_group, label="load_checkpoint")

    def _restore_extra_state(self, saved: dict[str, Any]) -> None:
        """Hand modules what their ``get_extra_state`` returned, where it is no tensor."""
        extra = {
            name: saved[name]
            for name in _not_tensors(self.module.state_dict(keep_vars=True))
            if name in saved
        }
        if extra:
            self.module.load_state_dict(extra, strict=False)

    def _restore_optimizer(self, restorer: Restorer, manifest: Manifest, main: dict[str, Any]) -> None:
        if self._zero is None:
            return
        if manifest.about["loss_scaler"] is not None and self.policy.loss_scaled:
            self._zero.loss_scaler.load_state_dict(manifest.about["loss_scaler"])
        saved = from_plain(main["engine"]["param_groups"], main["engine"]["group_types"])
        chosen = self._matching_groups(restorer, [set(names) for names in manifest.about["groups"]])
        for group, match in zip(self._zero.param_groups, chosen, strict=True):
            group.update({} if match is None else saved[match])
        fresh = [name for part in self._all(restorer.fresh) for name in part]
        if fresh and manifest.scalars:
            announce(
                f"load_checkpoint: {fresh[0]} and {len(set(fresh)) - 1} more have no optimizer states in "
                f"{manifest.about['tag']}; theirs start afresh"
            )

    def _matching_groups(self, restorer: Restorer, saved: list[set[str]]) -> list[int | None]:
        """Return, for each param group, the saved one that most of its parameters were in."""
        votes = [
            [len({restorer.fit.names.get(name) for name in names} & theirs) for theirs in saved]
            for names in self._group_names()
        ]
        totals = [
            [sum(column) for column in zip(*rows, strict=True)]
            for rows in zip(*self._all(votes), strict=True)
        ]
        return [row.index(max(row)) if row and max(row) > 0 else None for row in totals]

    def _restore_randomness(self, reader: Reader) -> None:
        files = reader.manifest.about["optimizer_files"]
        if "imported" in reader.manifest.about:  # the original saves none
            return
        if len(files) != self.data_parallel.size:
            if self.data_parallel.rank == 0:
                announce(
                    f"load_checkpoint: saved on {len(files)} ranks, loaded on {self.data_parallel.size}: their random "
                    "number generators go on as they are"
                )
            return
        saved = reader.structure(files[self.data_parallel.rank])["rng"]
        set_random_states(from_plain(saved["states"], saved["types"]))

    # -- together ---------------------------------------------------------------------------------

    @property
    def _stage(self) -> int:
        return int(self.settings.zero_optimization.stage)

    def _group_names(self) -> list[list[str]]:
        """Return the names of the parameters in each param group that this rank has a part of."""
        if self._zero is None:
            return []
        names: dict[int, list[str]] = {id(group): [] for group in self._zero.param_groups}
        for leaves in self._zero.states.leaves.values():
            for leaf in leaves:
                names[id(leaf.group)] += [leaf.unit.names[piece.index] for piece in leaf.pieces]
        return list(names.values())

    def _check_present(self, call: str) -> None:
        if self._zero is not None and not self._zero.parking.is_empty:
            raise UsageError(f"engine.{call}: states are away; call engine.reload_states() first")

    def _agreed_tag(self, call: str, tag: str) -> str:
        """Return the first rank's tag; what happens where another has another one is configured."""
        tags = self._all(tag)
        other = next((rank for rank, one in enumerate(tags) if one != tags[0]), None)
        if other is not None:
            said = f"{call}: tag: expected the same on every rank, got {tags[0]!r} and on rank {other} {tags[other]!r}"
            if self.settings.checkpoint.tag_validation == "fail":
                raise UsageError(f"{said} (checkpoint.tag_validation)")
            if self.settings.checkpoint.tag_validation == "warn":
                announce(f"{said}; that of rank 0 is used")
        first: str = tags[0]
        return first

    def _all(self, item: Any) -> list[Any]:
        """Return every rank's `item`."""
        group = self.data_parallel
        if group.size == 1:
            return [item]
        items: list[Any] = [None] * group.size
        dist.all_gather_object(items, item, group=group.process_group)
        return items

    def _together(self, call: str, action: Callable[[], Result]) -> Result:
        """Do something on every rank; an error of one is raised on all."""
        error: DeepSpeedError | None = None
        result: Any = None
        try:
            result = action()
        except DeepSpeedError as caught:
            error = caught
        except Exception as caught:
            error = CheckpointError(f"{call}: {type(caught).__name__}: {caught}")
            error.__cause__ = caught
        raise_together(error, self.data_parallel.process_group, label=call)
        done: Result = result
        return done


def _not_tensors(state: dict[str, Any]) -> dict[str, Any]:
    """Return what a state dict holds beside tensors, as plain data."""
    rest = {name: value for name, value in state.items() if not isinstance(value, torch.Tensor)}
    plain, types = to_plain(rest, "module.state_dict()")
    if types:
        raise UsageError(
            f"module.state_dict()[{types[0][0][0]!r}]: expected plain data or a tensor, got a {types[0][1]}"
        )
    made: dict[str, Any] = plain
    return made


def _raise(error: DeepSpeedError | None) -> None:
    if error is not None:
        raise error
