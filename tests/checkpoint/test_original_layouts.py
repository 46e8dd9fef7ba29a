"""Layouts that the original writes on other machines or with other settings, made from its files."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from test_original import FOLDER, truth_of

from deepspeed.checkpoint.manifest import MASTER, STATE
from deepspeed.checkpoint.opening import open_folder
from deepspeed.checkpoint.original import CLASSES
from deepspeed.checkpoint.unpickling import load_safely
from deepspeed.checkpoint.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from deepspeed.errors import CheckpointError

MAIN = "mp_rank_00_model_states.pt"


@pytest.fixture
def changed(tmp_path):
    """Return a function that copies a case and changes each file of a pattern; it returns the folder."""

    def change(name, pattern, change):
        folder = tmp_path / "global_step2"
        shutil.copytree(FOLDER / name / "global_step2", folder)
        for path in folder.glob(pattern):
            content = torch.load(path, weights_only=False) if pattern == MAIN else loaded(path)
            change(content)
            torch.save(content, path.with_suffix(".new"))
            os.replace(path.with_suffix(".new"), path)  # what is mapped stays
        return folder

    return change


def loaded(path):
    """Return a rank's file, with plain data for what is of the original's classes."""
    return load_safely(path, CLASSES)


def same(folder, name):
    """Compare masters and states with the original's own."""
    reader, now = open_folder(folder), truth_of(name)["now"]
    kinds = {MASTER: now["master"], **{STATE + key: values for key, values in now["state"].items()}}
    for kind, expected in kinds.items():
        found = reader.manifest.values.get(kind, {})
        assert kind == MASTER or found.keys() == expected.keys()
        for key, value in found.items():
            out = torch.empty(expected[key].numel())
            reader.read(value, 0, out)
            assert torch.equal(out, expected[key].reshape(-1)), (kind, key)
    steps = {tuple(numbers["step"]) for numbers in reader.manifest.scalars.values()}
    assert steps in (
        {("float32", 2)},
        {("float32", 3)},
    )  # one too many at stage 0 with bf16
    return reader


def regroup(groups):
    """Return a change of a main file: param groups of those parameters, by their number until now."""

    def change(main):
        optimizer = main["optimizer"]
        inner = optimizer.get("optimizer_state_dict", optimizer)
        order = [number for group in groups for number in group]
        inner["state"] = {new: inner["state"][old] for new, old in enumerate(order)}
        options, start = inner["param_groups"][0], 0
        inner["param_groups"] = []
        for group in groups:
            inner["param_groups"].append({**options, "params": list(range(start, start + len(group)))})
            start += len(group)
        if "fp32_groups" in optimizer:
            masters = optimizer["fp32_groups"][0]
            optimizer["fp32_groups"] = [[masters[number] for number in group] for group in groups]

    return change


GROUPS = [[1, 2, 4, 6], [0, 3, 5]]


@pytest.mark.parametrize("name", ["stage0-fp32", "stage0-bf16"])
def test_several_groups_of_stage_0_are_told_apart(changed, name):
    reader = same(changed(name, MAIN, regroup(GROUPS)), name)
    matrices = ["embed.weight", "inner.weight", "outer.weight", "head.weight"]
    assert reader.manifest.about["groups"] == [matrices, ["gain", "inner.bias", "outer.bias"]]


def test_masters_tell_names_where_shapes_do_not(changed):
    same(changed("stage0-bf16", MAIN, regroup([[6, 1], [5, 4, 3, 2, 0]])), "stage0-bf16")


def test_states_of_stage_0_without_certain_names_are_an_error_unless_they_are_not_wanted(changed):
    folder = changed("stage0-fp32", MAIN, regroup([[1, 2], [0, 3, 4, 5, 6]]))
    with pytest.raises(CheckpointError, match=r"without names.*load_optimizer_states=False"):
        open_folder(folder)
    assert STATE + "exp_avg" not in open_folder(folder, states=False).manifest.values


def flatten(main):
    """Let masters and states of a group be one flat, as with the original's fused optimizers."""
    optimizer = main["optimizer"]
    inner, masters = optimizer["optimizer_state_dict"], optimizer.pop("fp32_groups")
    optimizer["fp32_groups_flat"] = [torch.cat([one.reshape(-1) for one in group]) for group in masters]
    state = inner["state"]
    flat = {
        key: torch.cat([state[number][key].reshape(-1) for number in state])
        for key in ("exp_avg", "exp_avg_sq")
    }
    inner["state"] = {0: {**flat, "step": 2}}
    inner["param_groups"][0]["params"] = [0]


@pytest.mark.parametrize("name", ["stage0-bf16", "stage0-fp16"])
def test_flat_masters_of_stage_0_are_cut(changed, name):
    same(changed(name, MAIN, flatten), name)


def count_in_group(content):
    """Count steps in the param group, as a plain number."""
    inner = content["optimizer_state_dict"]["optimizer_state_dict"]
    for state in inner["state"].values():
        del state["step"]
    inner["param_groups"][0]["step"] = 2


def test_steps_may_be_counted_in_the_param_group(changed):
    folder = changed_ranks(changed, "stage3-bf16", count_in_group)
    reader = same(folder, "stage3-bf16")
    assert "step" not in reader.structure(reader.manifest.about["main"])["engine"]["param_groups"][0]


def changed_ranks(changed, name, change):
    """Change the files of all ranks; what they have of the original's classes is not needed."""

    def plain(content):
        change(content)
        states = content["optimizer_state_dict"]
        for key in ("loss_scaler", "zero_stage"):
            del states[key]

    return changed(name, "*optim_states.pt", plain)


@pytest.mark.parametrize("name", ["stage0-fp32", "stage1-bf16", "stage3-bf16-3ranks"])
def test_whole_weights_are_read_from_the_original_s_folder(name):
    master = truth_of(name)["now"]["master"]
    for folder in (FOLDER / name, FOLDER / name / "global_step2"):
        whole = get_fp32_state_dict_from_zero_checkpoint(folder)
        for key, value in master.items():
            assert torch.equal(whole[key], value), key
    if "stage1" in name:
        assert whole["head.weight"] is whole["embed.weight"]
