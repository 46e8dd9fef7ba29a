"""What cannot be imported is an error that names it, and nothing in a checkpoint is ever run."""

from __future__ import annotations

import os
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_runs import make_engine as make_own
from harness import run_on_ranks
from original_cases import CASES
from test_damage import on_first, refusal
from test_original import FOLDER, make_engine

from deepspeed.checkpoint.manifest import Manifest
from deepspeed.checkpoint.opening import open_folder
from deepspeed.checkpoint.original import CLASSES
from deepspeed.checkpoint.reading import CheckpointReader
from deepspeed.checkpoint.records import FileEntry, _frame_checksum
from deepspeed.checkpoint.unpickling import load_safely
from deepspeed.errors import CheckpointError

MAIN = "mp_rank_00_model_states.pt"


@pytest.fixture
def copied(tmp_path):
    """Return a function that copies a case and returns the checkpoint's folder."""

    def copy(name):
        shutil.copytree(FOLDER / name, tmp_path / name)
        return tmp_path / name / "global_step2"

    return copy


def refused(folder, *words):
    with pytest.raises(CheckpointError) as caught:
        open_folder(folder).check()
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"


class Evil:
    """Leave a mark when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


class Stranger:
    """A class that nobody else has."""


@pytest.mark.parametrize("name", ["stage2-bf16", "stage3-bf16"])
def test_every_missing_cut_or_damaged_file_is_named(copied, name):
    folder = copied(name)
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        path.unlink()
        refused(folder, str(path) if "optim" in path.name or name == "stage3-bf16" else MAIN, "missing")
        path.write_bytes(content[: len(content) // 2])
        refused(folder, str(path), "cut")
        path.write_bytes(content)
        place = data_place(path)
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        refused(folder, str(path), "damaged")
        path.write_bytes(content)
    open_folder(folder).check()


def data_place(path):
    """Return where the last tensor of a file has its first byte."""
    with zipfile.ZipFile(path) as archive:
        info = max(
            (one for one in archive.infolist() if "/data/" in one.filename), key=lambda one: one.file_size
        )
        content = archive.read(info)
    return path.read_bytes().index(content)


def test_files_of_another_world_size_are_named(copied):
    folder = copied("stage2-bf16")
    _, second = sorted(folder.glob("*optim*"))
    extra = Path(str(second).replace("rank_1", "rank_2"))
    shutil.copy(second, extra)
    refused(folder, extra.name, "of 2 ranks")
    extra.unlink()
    shutil.copy(next((FOLDER / "stage2-bf16-3ranks/global_step2").glob("*rank_1_*optim*")), second)
    refused(folder, second.name, "cut for 3 ranks", "of 2")


@pytest.mark.parametrize(
    ("name", "key"), [("stage2-bf16", "param_slice_mappings"), ("stage3-bf16", "fp32_flat_groups")]
)
def test_a_file_without_what_is_needed_is_named(copied, name, key):
    path = sorted(copied(name).glob("*optim*"))[1]
    content = load_safely(path, CLASSES)
    states = {
        one: value
        for one, value in content["optimizer_state_dict"].items()
        if isinstance(value, (dict, list))
    }
    del states[key]
    torch.save({"optimizer_state_dict": states}, path.parent / "new")
    os.replace(path.parent / "new", path)
    refused(path.parent, str(path), repr(key))


@pytest.mark.parametrize(
    ("file", "what"),
    [
        ("layer_00-model_00-model_states.pt", "pipeline"),
        ("mp_rank_01_model_states.pt", "tensor parallelism"),
        ("layer_0_expert_1_mp_rank_00_model_states.pt", "experts"),
        ("zero/embed.weight/fp32.pt", "universal"),
    ],
)
def test_kinds_that_cannot_be_imported_are_told_in_one_sentence(copied, file, what):
    folder = copied("stage2-bf16")
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / MAIN, folder / file)
    refused(folder, str(folder), what)


@pytest.mark.parametrize("which", ["main", "optimizer"])
def test_code_in_an_original_s_file_is_refused_and_not_run(copied, tmp_path, which):
    folder, mark = copied("stage2-bf16"), tmp_path / "ran"
    path = folder / MAIN if which == "main" else next(folder.glob("*optim*"))
    content = torch.load(path, weights_only=False) if which == "main" else {"optimizer_state_dict": {}}
    torch.save({**content, "epoch": Evil(mark)}, path)
    refused(folder, str(path), "posix.system")
    assert not mark.exists()
    with open(path, "wb") as file:
        pickle.dump(Evil(mark), file)
    refused(folder, str(path))
    assert not mark.exists()


def test_an_unknown_class_is_named(copied):
    path = copied("stage2-bf16") / MAIN
    content = torch.load(path, weights_only=False)
    torch.save({**content, "epoch": Stranger()}, path)
    refused(path.parent, str(path), "test_original_damage.Stranger")


def test_numpy_and_sets_of_a_client_state_come_over(copied):
    path = copied("stage2-bf16") / MAIN
    content = torch.load(path, weights_only=False)
    client = {"seen": np.arange(3), "best": np.float64(0.5), "names": {"a", "b"}}
    torch.save({**content, **client}, path)
    reader = open_folder(path.parent)
    main = reader.structure(MAIN)
    assert main["seen"].tolist() == [0, 1, 2]
    assert (main["best"], main["names"]) == (0.5, {"a", "b"})
    assert set(main["engine"]["client_keys"]) == {"epoch", "args", "seen", "best", "names"}


def save_evil(folder, mark):
    """Save a checkpoint of ours whose manifest fits a main file with code in it."""
    engine = make_own(2)
    engine.save_checkpoint(folder)
    checkpoint = Path(folder) / "global_step0"
    plain = load_safely(checkpoint / MAIN)
    torch.save({**plain, "epoch": Evil(mark)}, checkpoint / "evil")
    os.replace(checkpoint / "evil", checkpoint / MAIN)
    reader = open_manifest(checkpoint)
    with pytest.raises(CheckpointError, match=r"posix\.system"):
        reader.structure(MAIN)
    with pytest.raises(CheckpointError):
        engine.load_checkpoint(folder)
    assert not Path(mark).exists()
    engine.destroy()


def open_manifest(checkpoint):
    """Open a checkpoint whose checksums of the main file are those of what it is now."""
    manifest = Manifest.read(checkpoint)
    index = manifest.file_named(MAIN)
    path = checkpoint / MAIN
    with open(path, "rb") as file:
        frame = _frame_checksum(file.fileno(), path.stat().st_size, [])
    manifest.files[index] = FileEntry(MAIN, path.stat().st_size, frame, [])
    manifest.values.clear()
    return CheckpointReader(checkpoint, manifest)


def test_code_in_a_file_of_ours_is_refused_and_not_run(tmp_path):
    run_on_ranks(1, save_evil, str(tmp_path), str(tmp_path / "ran"))


def load_parts(name):
    engine = make_engine(CASES[name])
    engine.load_checkpoint(FOLDER / name, load_optimizer_states=False, load_lr_scheduler_states=False)
    assert engine.global_steps == 2
    engine.load_checkpoint(FOLDER / name, load_module_only=True)
    engine.destroy()


@pytest.mark.parametrize("name", ["stage0-fp32", "stage3-bf16"])
def test_parts_may_be_left_out(name):
    run_on_ranks(2, load_parts, name)


def one_file_less(folder, name):
    engine = make_engine(CASES[name])
    path = next((Path(folder) / "global_step2").glob("*rank_1_*optim*"))
    on_first(path.unlink)
    assert f"{path}: missing" in refusal(engine, folder)
    engine.destroy()


@pytest.mark.parametrize("name", ["stage1-bf16", "stage3-fp16"])
def test_a_missing_file_is_an_error_on_every_rank(copied, name):
    run_on_ranks(2, one_file_less, str(copied(name).parent), name)
