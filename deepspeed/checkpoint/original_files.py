"""Which files a checkpoint of the original DeepSpeed consists of, and which kinds of them cannot be imported.

global_step20/
  mp_rank_00_model_states.pt                        weights and counters; at stage 3 one for each rank:
  zero_pp_rank_R_mp_rank_00_model_states.pt
  [bf16_]zero_pp_rank_R_mp_rank_00_optim_states.pt  masters and states of rank R; at stage 0 there is none
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from deepspeed.errors import CheckpointError

_MODEL = re.compile(r"(?:zero_pp_rank_(?P<rank>\d+)_)?mp_rank_(?P<part>\d+)_model_states\.pt")
_OPTIMIZER = re.compile(r"(?:\w+_)?zero_pp_rank_(?P<rank>\d+)_mp_rank_(?P<part>\d+)_optim_states\.pt")

_REFUSED = (
    (re.compile(r".*expert_.*|expp_rank_.*"), "with experts (MoE)"),
    (re.compile(r"layer_\d+-.*_states\.pt"), "of a pipeline"),
    (re.compile(r".*mp_rank_(?!00_)\d+_.*_states\.pt"), "of a model split by tensor parallelism"),
)


@dataclass(frozen=True)
class OriginalFiles:
    """The files of a checkpoint, by rank.

    Attributes:
        main: the one with the counters.
        models: with weights; one for all ranks, or one for each.
        optimizers: with masters and states.
        sharded: whether the weights are not whole in one file (stage 3).
    """

    main: Path
    models: list[Path]
    optimizers: list[Path]
    sharded: bool


def find_files(folder: Path) -> OriginalFiles | None:
    """Return a checkpoint's files, or None where the folder is of something else.

    Raises:
        CheckpointError: it is of a kind that cannot be imported, or a rank's file is missing.
    """
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    models = _by_rank(folder, names, _MODEL)
    optimizers = _by_rank(folder, names, _OPTIMIZER)
    if not models and not optimizers:
        return None
    _refuse(folder, names)
    if not models:
        raise CheckpointError(f"{folder / 'mp_rank_00_model_states.pt'}: missing")
    whole = models.pop(-1, None)
    if whole is not None and models:
        raise CheckpointError(
            f"{folder}: holds files of several checkpoints: {whole.name} of one with whole weights and "
            f"{next(iter(models.values())).name} of one at stage 3; remove those that do not belong to it"
        )
    shards = [models[rank] for rank in _all_ranks(models)]
    states = [optimizers[rank] for rank in _all_ranks(optimizers)]
    return OriginalFiles(whole or shards[0], [whole] if whole else shards, states, sharded=whole is None)


def named_like(path: Path, rank: int) -> Path:
    """Return the file of another rank."""
    return path.with_name(re.sub(r"pp_rank_\d+_", f"pp_rank_{rank}_", path.name))


def _by_rank(folder: Path, names: list[str], pattern: re.Pattern[str]) -> dict[int, Path]:
    """Return files of a kind by rank, -1 for one that is all ranks'."""
    found = [(match, name) for name in names if (match := pattern.fullmatch(name))]
    return {int(match["rank"] or -1): folder / name for match, name in found}


def _all_ranks(files: dict[int, Path]) -> list[int]:
    """Return the ranks; raise where one of them has no file."""
    ranks = sorted(files)
    for rank, found in enumerate(ranks):
        if rank != found:
            raise CheckpointError(f"{named_like(files[found], rank)}: missing")
    return ranks


def _refuse(folder: Path, names: list[str]) -> None:
    kinds = [kind for name in names for pattern, kind in _REFUSED if pattern.fullmatch(name)]
    if (folder / "zero").is_dir():
        kinds.append("converted to the universal format")
    if kinds:
        raise CheckpointError(
            f"{folder}: a checkpoint of the original DeepSpeed {kinds[0]}: only those of data parallelism and ZeRO are "
            "imported; load the weights from a whole state dict instead"
        )
