"""``ds_ckpt verify``: read everything and compare all checksums."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.filesize import decimal

from deepspeed.checkpoint import folders
from deepspeed.checkpoint.manifest import NAME, Manifest
from deepspeed.checkpoint.opening import open_folder
from deepspeed.checkpoint.original import damages_in
from deepspeed.checkpoint.records import BLOCK, BlockSource, FileEntry, Progress, RecordReader
from deepspeed.checkpoint.tools.contents import PATIENCE
from deepspeed.checkpoint.tools.finding import PARTIAL, locate, survey, tag_of
from deepspeed.common import tables
from deepspeed.common.progress import ByteBar
from deepspeed.errors import CheckpointError, UsageError


@dataclass
class Damage:
    """Bytes `start` to `stop` of a file; None where they are not known."""

    file: str | None
    start: int | None
    stop: int | None
    text: str


@dataclass
class Report:
    """What reading a whole checkpoint has found."""

    tag: str
    folder: Path
    nbytes: int
    damages: list[Damage]


def run(asked: argparse.Namespace) -> int:
    """Run the command."""
    if asked.all:
        targets = [one.folder for one in survey(asked.folder) if one.state != PARTIAL]
        if not targets:
            raise UsageError(f"{asked.folder}: there is no checkpoint in it")
    else:
        targets = [locate(asked.folder, asked.tag)]
    reports = [verified(folder) for folder in targets]
    damaged = [report for report in reports if report.damages]
    back = _newest_whole(asked.folder, reports) if damaged else []
    if asked.json:
        records = [
            {**asdict(report), "folder": str(report.folder), "whole": not report.damages}
            for report in reports
        ]
        print(json.dumps({"checkpoints": records, "way_back": back[0] if back else None}, indent=1))
    else:
        _print(reports, str(asked.folder))
        if damaged:
            print(folders.way_back(back, _home(asked.folder, reports)))
    return 1 if damaged else 0


def verified(folder: Path) -> Report:
    """Read all files of a checkpoint."""
    tag = tag_of(folder)
    if not (folder / NAME).is_file():
        return _verified_original(folder, tag)
    try:
        manifest = Manifest.read(folder)
    except CheckpointError as error:
        return Report(tag, folder, 0, [Damage(NAME, None, None, str(error))])
    nbytes = sum(entry.size for entry in manifest.files)
    damages: list[Damage] = []
    source = BlockSource()
    with ByteBar(f"verifying {tag}", nbytes, patience=PATIENCE) as bar:
        for entry in manifest.files:
            damages += _damages(folder / entry.name, entry, source, bar.advance)
    source.close()
    return Report(tag, folder, nbytes, damages)


def _verified_original(folder: Path, tag: str) -> Report:
    """Compare the checksums that torch files have themselves, and whether the files belong together."""
    damages: list[Damage] = []
    nbytes = 0
    for path in sorted(folder.glob("*_states.pt")):
        damages += [Damage(path.name, None, None, text) for text in damages_in(path)]
        nbytes += path.stat().st_size
    try:
        open_folder(folder).close()
    except CheckpointError as error:
        if not any(f"{one.file}:" in str(error) for one in damages):
            damages.append(Damage(None, None, None, str(error)))
    return Report(tag, folder, nbytes, damages)


def _damages(path: Path, entry: FileEntry, source: BlockSource, progress: Progress) -> list[Damage]:
    if not path.is_file():
        return [Damage(entry.name, 0, entry.size, f"{path}: missing")]
    size = path.stat().st_size
    if size < entry.size:
        text = f"{path}: cut: expected {entry.size} bytes, got {size}"
        return [Damage(entry.name, size, entry.size, text)]
    found: list[Damage] = []
    try:
        reader = RecordReader(path, entry, source, progress)
    except CheckpointError as error:
        return [Damage(entry.name, None, None, str(error))]
    try:
        reader.check_frame()
    except CheckpointError as error:
        found.append(Damage(entry.name, None, None, str(error)))
    for block in entry.blocks():
        try:
            reader.check([block])
        except CheckpointError as error:
            record = entry.records[block[0]]
            start = record.offset + block[1] * BLOCK
            stop = min(start + BLOCK, record.offset + record.nbytes)
            found.append(Damage(entry.name, start, stop, str(error)))
    reader.close()
    return _merged(path, found)


def _merged(path: Path, found: list[Damage]) -> list[Damage]:
    """Make one of damages that follow each other."""
    merged: list[Damage] = []
    for one in found:
        if merged and one.start is not None and merged[-1].stop == one.start:
            first = merged.pop()
            text = f"{path}: damaged: bytes {first.start} to {one.stop} are not those that were written"
            one = Damage(one.file, first.start, one.stop, text)
        merged.append(one)
    return merged


def _newest_whole(path: Path, reports: list[Report]) -> list[str]:
    """Return the newest checkpoint that is found whole when it is read, too."""
    known = {report.tag: not report.damages for report in reports}
    home = _home(path, reports)
    for tag in folders.whole_checkpoints(home):
        if tag not in known:
            known[tag] = not verified(home / tag).damages
        if known[tag]:
            return [tag]
    return []


def _home(path: Path, reports: list[Report]) -> Path:
    """Return the folder that the checkpoints are in."""
    return Path(os.path.normpath(path / "..")) if reports[0].folder == path else path


def _print(reports: list[Report], title: str) -> None:
    table = tables.new_table(title)
    for name in ("tag", "state", "read"):
        table.add_column(name, justify="right" if name == "read" else "left")
    for report in reports:
        state = f"damaged in {len(report.damages)} places" if len(report.damages) > 1 else "damaged"
        table.add_row(report.tag, state if report.damages else "whole", decimal(report.nbytes))
    tables.show(table)
    for report in reports:
        for damage in report.damages:
            print(damage.text)
