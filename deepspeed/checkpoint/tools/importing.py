"""``ds_ckpt import``: write a checkpoint of the original DeepSpeed as one of this release.

Loading and everything else here read the original's files as they are; what is written has checksums, needs no files
of many ranks, and its pieces can be read without the others.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.filesize import decimal
from torch import Tensor

from deepspeed.checkpoint import folders
from deepspeed.checkpoint.contents import OptimizerContents, Part, Parts, main_contents, nbytes_of
from deepspeed.checkpoint.manifest import COUNTERS, NAME, WEIGHT, Manifest
from deepspeed.checkpoint.plain import from_plain
from deepspeed.checkpoint.reading import Reader
from deepspeed.checkpoint.records import RecordWriter, Room
from deepspeed.checkpoint.saving import Commit, Save
from deepspeed.checkpoint.tools.contents import PATIENCE, opened, parts_of
from deepspeed.checkpoint.tools.finding import dtype_of, locate, tag_of
from deepspeed.common.progress import ByteBar
from deepspeed.errors import DeepSpeedError, UsageError
from deepspeed.version import __version__


def run(asked: argparse.Namespace) -> int:
    """Run the command."""
    source = locate(asked.folder, asked.tag)
    if (source / NAME).is_file():
        raise UsageError(f"DIR: {source} is a checkpoint of this release; copy its folder to {asked.out}")
    tag = tag_of(source)
    if folders.find(asked.out, tag) is not None:
        raise UsageError(f"OUT: {asked.out} has a checkpoint {tag!r} already; name another folder")
    with opened(source) as reader, ByteBar(f"importing {tag}", patience=PATIENCE) as bar:
        reader.check()
        made = rewrite(reader, asked.out, tag, bar)
    print(f"{made}: {decimal(bar.done)} of {reader.manifest.about['imported']}")
    return 0


def rewrite(reader: Reader, folder: Path, tag: str, bar: ByteBar) -> Path:
    """Write an open checkpoint as one of a single rank; return its folder.

    Values are read and written a part at a time. `latest` names it where that is not there yet.
    """
    old = reader.manifest
    about = {
        **old.about,
        "tag": tag,
        "stage": 0,
        "world_size": 1,
        "ds_version": __version__,
        "main": folders.model_file(0, sharded=False),
        "optimizer_files": [folders.optimizer_file(0, bf16=dtype_of(old) == "bfloat16")],
    }
    latest = not (folder / folders.LATEST).exists()
    commit = Commit(Manifest(about, old.parameters), ranks=1, latest=latest, keep_last=0, safetensors=False)
    save = Save(folder, tag, 0, about["frozen_left_out"], about["groups"], bar, commit, old.scalars)
    weights, states = OptimizerContents(None), OptimizerContents(None)
    states.scalars = old.scalars
    for kind, named in old.values.items():
        parts = (weights if kind == WEIGHT else states).parts.setdefault(kind, {})
        for name, value in named.items():
            room = Room(tuple(value.shape), value.torch_dtype)
            parts[name] = Part(room, value.shape, 0, torch.Size(value.shape).numel())
    bar.expect(nbytes_of(weights.parts) + nbytes_of(states.parts))
    main = _main(reader, {name: part.room for name, part in weights.parts.get(WEIGHT, {}).items()})
    optimizer = {
        "optimizer_state_dict": {"zero_stage": 0, **states.structure()},
        "rng": {"states": {}, "types": []},
        "ds_version": __version__,
    }
    folders.begin(folder, tag)
    try:
        _write(save.add_file(about["main"], main, weights.parts, later=False), weights.parts, reader)
        name = about["optimizer_files"][0]
        _write(save.add_file(name, optimizer, states.parts, later=False), states.parts, reader)
        save.write()
        save.finish()
    except (DeepSpeedError, OSError):
        save.abandon()
        raise
    return folder / tag


def _main(reader: Reader, rooms: dict[str, Room]) -> dict[str, Any]:
    """Return what the main file holds."""
    old = reader.manifest
    found = reader.structure(old.about["main"])
    own = found["engine"]
    module = {name: value for name, value in found["module"].items() if not isinstance(value, Tensor)}
    for name, room in rooms.items():
        module.update(dict.fromkeys((name, *old.parameters[name]["aliases"]), room))
    contents = main_contents(
        from_plain({key: found[key] for key in own["client_keys"]}, own["client_types"]),
        from_plain(found["lr_scheduler"], own["schedule_types"]),
        from_plain(own["param_groups"], own["group_types"]),
        buffers=[name for name, about in old.parameters.items() if about.get("buffer")],
        ranks=1,
        counters={name: old.about[name] for name in COUNTERS},
    )
    return {"module": module, **contents}


def _write(writer: RecordWriter, parts: Parts, reader: Reader) -> None:
    for kind, named in parts.items():
        for name, part in named.items():
            for values in parts_of(reader, reader.manifest.values[kind][name]):
                writer.append(part.room, values)
