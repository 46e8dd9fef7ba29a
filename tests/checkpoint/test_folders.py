"""Folders of checkpoints: any place that a user may name, and nothing of others is lost."""

from __future__ import annotations

import os

import pytest
from checkpoint_runs import make_engine
from harness import run_on_ranks

from deepspeed.checkpoint import folders
from deepspeed.checkpoint.manifest import NAME, Manifest
from deepspeed.errors import CheckpointError, UsageError


def put(save_dir, tag, step=1, *, latest=True):
    """Make a checkpoint that has nothing but a manifest."""
    folders.begin(save_dir, tag)
    return folders.commit(save_dir, tag, Manifest({"global_steps": step}), latest=latest)


def names(folder):
    return sorted(os.listdir(folder))


@pytest.mark.parametrize(
    ("tag", "named"),
    [("", "."), ("a/", "a"), ("../beside", "../beside"), ("../runs", "../runs"), ("x/y", "x/y")],
)
def test_latest_names_any_tag_so_that_it_is_found(tmp_path, tag, named):
    save_dir = tmp_path / "runs"
    for _ in range(2):  # the second takes the place of the first
        put(save_dir, folders.checked_tag(tag))
    assert folders.read_latest(save_dir) == named
    assert folders.find(save_dir, named) == tmp_path.joinpath(os.path.normpath(f"runs/{tag}"))
    assert (save_dir / named / NAME).is_file()


@pytest.mark.parametrize("tag", ["latest", "zero_to_fp32.py", " space", "line\n", "a\0b"])
def test_a_tag_that_latest_cannot_name_is_refused(tag):
    with pytest.raises(UsageError, match=r"^tag: expected"):
        folders.checked_tag(tag)


def test_a_file_in_the_place_of_a_checkpoint_stays_and_is_named(tmp_path):
    (tmp_path / "tag").write_text("mine")
    with pytest.raises(CheckpointError, match=r"tag: a file, where"):
        folders.begin(tmp_path, "tag")
    assert (tmp_path / "tag").read_text() == "mine"
    assert names(tmp_path) == ["tag"]


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_in_the_place_of_a_checkpoint_is_replaced_and_what_it_names_stays(tmp_path, exists):
    elsewhere, save_dir = tmp_path / "elsewhere", tmp_path / "runs"
    save_dir.mkdir()
    if exists:
        elsewhere.mkdir()
        (elsewhere / "notes").write_text("mine")
    (save_dir / "tag").symlink_to(elsewhere)
    for _ in range(2):
        put(save_dir, "tag")
    assert names(save_dir) == ["latest", "tag"]
    assert names(save_dir / "tag") == [NAME]
    assert not exists or names(elsewhere) == ["notes"]


def test_a_latest_that_is_no_name_at_all_is_said(tmp_path):
    (tmp_path / "latest").write_text("x" * 5000)
    with pytest.raises(CheckpointError, match=r"latest: names .xxx.*not there"):
        folders.read_latest(tmp_path)


def test_pruning_keeps_what_was_just_saved_links_and_the_latest(tmp_path):
    (tmp_path / "other").mkdir()
    put(tmp_path / "other", "tag", step=9)
    for step in (2, 7, 8):
        put(tmp_path, f"global_step{step}", step, latest=step == 2)
    (tmp_path / "global_step9").symlink_to(tmp_path / "other" / "tag")
    put(tmp_path, "global_step1", latest=False)  # of a run that began anew
    folders.prune(tmp_path, 1, "global_step1")
    kept = [f"global_step{step}" for step in (1, 2, 8, 9)]
    assert names(tmp_path) == [*kept, "latest", "other"]
    assert names(tmp_path / "other" / "tag") == [NAME]


def test_a_save_is_not_failed_by_older_checkpoints_that_cannot_be_removed(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(folders.logger, "warning", lambda text, error: said.append(text % error))
    put(tmp_path, "global_step1")
    put(tmp_path, "global_step2", step=2)
    (tmp_path / "latest").write_text("gone")
    folders.prune(tmp_path, 1, "global_step2")
    assert names(tmp_path) == ["global_step1", "global_step2", "latest"]
    assert "checkpoint.keep_last: older checkpoints stay: " in said[0]


def without_script(folder):
    engine, script = make_engine(0), folder / "zero_to_fp32.py"
    script.write_bytes(b"\xff\xfe")  # another file of that name is replaced
    engine.save_checkpoint(folder, "first")
    script.unlink()
    script.mkdir()
    with pytest.raises(CheckpointError, match=r"zero_to_fp32\.py"):
        engine.save_checkpoint(folder, "second")
    assert folders.read_latest(folder) == "first"
    assert folders.whole_checkpoints(folder) == ["first"]
    engine.destroy()


def test_nothing_is_committed_where_the_script_cannot_be_written(tmp_path):
    run_on_ranks(1, without_script, tmp_path)
