"""What goes into a checkpoint comes back: of every kind of model, optimizer and state."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from checkpoint_runs import compare, everything, make_engine, train
from harness import run_on_ranks
from torch import nn

import deepspeed
from deepspeed.errors import UsageError
from deepspeed.zero.access import safe_get_full_optimizer_state


def in_folder(count, body, *args):
    with tempfile.TemporaryDirectory() as folder:
        run_on_ranks(count, body, folder, *args)


def resumed(folder, stage=2, *, go_on=True, **options):
    """Train, save, go on; load into another engine that goes on, too, and compare to the bit."""
    first = make_engine(stage, **options)
    train(first, range(2))
    first.save_checkpoint(folder)
    if go_on:
        train(first, range(2, 4))
    expected = everything(first)
    first.destroy()
    second = make_engine(stage, seed=7, **options)
    second.load_checkpoint(folder)
    if go_on:
        train(second, range(2, 4))
    compare(everything(second), expected)
    second.destroy()


MODELS = [{"tied": True}, {"frozen": True}, {"unused": True}, {"tied": True, "frozen": True, "unused": True}]


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("model", MODELS, ids=str)
def test_tied_frozen_and_unused_parameters(stage, model):
    in_folder(2, kinds_of_models, stage, model)


def kinds_of_models(folder, stage, model):
    resumed(folder, stage, precision="bf16", model=model)
    state = torch.load(next(Path(folder).glob("*/*rank_00_model_states.pt")), weights_only=True)["module"]
    if model.get("tied") and stage < 3:  # there the masters are the weights
        assert state["embed.weight"].data_ptr() == state["head.weight"].data_ptr()


def sgd(params):
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def adafactor(params):
    return torch.optim.Adafactor(params, lr=0.01)


def adamw(params):
    return torch.optim.AdamW(params, lr=0.01, amsgrad=True)


def plain_sgd(params):
    return torch.optim.SGD(params, lr=0.1)


@pytest.mark.parametrize("make", [sgd, adafactor, adamw, plain_sgd])
@pytest.mark.parametrize("stage", [0, 3])
def test_any_optimizer(make, stage):
    in_folder(2, any_optimizer, make, stage)


def any_optimizer(folder, make, stage):
    resumed(folder, stage, optimizer=make)


def plain_adamw(params):
    return torch.optim.AdamW(params, lr=0.01)


def another_optimizer(folder):
    engine = make_engine(2)  # a configured AdamW
    train(engine, [0])
    engine.save_checkpoint(folder)
    other = make_engine(3, optimizer=sgd, seed=1)
    before = everything(other)
    with pytest.raises(
        UsageError, match=r"states of SGD \(momentum_buffer\), got those of FusedAdam \(exp_avg"
    ):
        other.load_checkpoint(folder)
    compare(everything(other), before)
    other.load_checkpoint(folder, load_optimizer_states=False)
    train(other, [1])
    same = make_engine(3, optimizer=plain_adamw, seed=1)
    same.load_checkpoint(folder)
    compare(everything(same), everything(engine))
    for one in (engine, other, same):
        one.destroy()


def test_states_of_another_optimizer_are_refused_unless_it_has_the_same():
    in_folder(2, another_optimizer)


@pytest.mark.parametrize("zero", [{"mics_shard_size": 1}, {"zero_hpz_partition_size": 1}], ids=str)
def test_groups_of_ranks(zero):
    in_folder(2, groups_of_ranks, zero)


def groups_of_ranks(folder, zero):
    resumed(folder, 3, precision="bf16", **zero)


CLIENT = {
    "epoch": 3,
    "best": float("inf"),
    "args": argparse.Namespace(lr=0.1, inner=argparse.Namespace(names=["a", None])),
    "seen": np.arange(4, dtype=np.int16),
    "mean": np.float64(0.5),
    "nested": OrderedDict(rows=[(1, torch.ones(2)), {2: b"\x00"}], shape=torch.Size([2, 3])),
    "kinds": {1, 2},
}


def client_state(folder):
    engine = make_engine(3)
    engine.save_checkpoint(folder, client_state=CLIENT)
    path, found = engine.load_checkpoint(folder)
    assert path == os.path.join(folder, "global_step0")
    assert found.keys() == CLIENT.keys()
    assert (found["epoch"], found["best"], found["args"], found["kinds"]) == (
        3,
        float("inf"),
        CLIENT["args"],
        {1, 2},
    )
    assert found["seen"].dtype == np.int16
    assert found["seen"].tolist() == [0, 1, 2, 3]
    assert type(found["mean"]) is np.float64
    assert type(found["nested"]) is OrderedDict
    assert found["nested"]["rows"][0][1].tolist() == [1, 1]
    assert found["nested"]["rows"][1] == {2: b"\x00"}
    assert found["nested"]["shape"] == torch.Size([2, 3])
    before = sorted(os.listdir(folder))
    for state, words in [
        ({"a": {"b": [engine.batch]}}, r"client_state\['a'\]\['b'\]\[0\]: .*BatchSizes"),
        ({"run": lambda: None}, r"client_state\['run'\]: .*function"),
        ({"module": 1}, "client_state: 'module' is a key of the checkpoint itself"),
        ([1], "client_state: expected a dict, got a list"),
    ]:
        with pytest.raises(UsageError, match=words):
            engine.save_checkpoint(folder, tag="other", client_state=state)
    dist.barrier()
    assert sorted(os.listdir(folder)) == before
    engine.destroy()


def test_client_state_comes_back_and_code_is_refused_by_its_key():
    in_folder(2, client_state)


def open_files(folder, stage):
    engine = make_engine(stage, "bf16")
    train(engine, [0])
    engine.save_checkpoint(folder, client_state={"epoch": 1})
    tag = Path(folder) / "global_step1"
    prefix = "zero_pp_rank_0_" if stage == 3 else ""
    main = torch.load(tag / f"{prefix}mp_rank_00_model_states.pt", weights_only=True, mmap=True)
    assert (main["epoch"], main["global_steps"], main["dp_world_size"]) == (1, 1, 2)
    if stage < 3:
        expected = engine.module.state_dict()
        assert main["module"].keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(main["module"][name], value)
    for rank in range(2):
        name = f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        states = torch.load(tag / name, weights_only=True)["optimizer_state_dict"]
        assert states["zero_stage"] == stage
        assert states["fp32_master"].keys() == states["state"]["exp_avg"].keys()
    engine.destroy()


@pytest.mark.parametrize("stage", [2, 3])
def test_files_have_the_names_and_keys_that_scripts_look_for_and_hold_no_code(stage):
    in_folder(2, open_files, stage)


class WithBuffers(nn.Module):
    """A model with buffers, a state of its own, and a layer that may be named otherwise."""

    def __init__(self, layer="layer", width=4):
        super().__init__()
        setattr(self, layer, nn.Linear(width, width))
        self.norm = nn.BatchNorm1d(width)
        self.gone = nn.Parameter(torch.zeros(3), requires_grad=False)
        self.note = "new"

    def forward(self, x):
        return self.norm(next(self.children())(x))

    def get_extra_state(self):
        return {"note": self.note}

    def set_extra_state(self, state):
        self.note = state["note"]


def engine_of(model, stage=2, optimizer=None, **config):
    return deepspeed.initialize(
        model=model,
        model_parameters=None if optimizer else [p for p in model.parameters() if p.requires_grad],
        optimizer=optimizer,
        config={
            "train_micro_batch_size_per_gpu": 2,
            **({} if optimizer else {"optimizer": {"type": "AdamW", "params": {"lr": 0.1}}}),
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            **config,
        },
    )[0]


def step(engine):
    loss = engine(torch.randn(2, 4, generator=torch.Generator().manual_seed(dist.get_rank()))).square().mean()
    engine.backward(loss)
    engine.step()


def weights_only(folder, stage):
    engine = engine_of(WithBuffers(), stage)
    engine.module.note = "kept"
    step(engine)
    engine.save_checkpoint(folder)
    saved = {
        name: value.clone() for name, value in engine.module_state_dict().items() if name != "_extra_state"
    }
    other = engine_of(WithBuffers(), stage)
    other.load_checkpoint(folder, load_module_only=True)
    assert (other.global_steps, other.module.note) == (0, "kept")
    state = other.module_state_dict()
    assert all(torch.equal(value, state[name]) for name, value in saved.items() if "running" not in name)
    assert torch.equal(other.module.norm.num_batches_tracked, torch.tensor(1))
    other.load_checkpoint(folder, load_optimizer_states=False)
    assert other.global_steps == 1
    weight = other.module.layer.weight
    assert safe_get_full_optimizer_state(weight, "exp_avg") is None
    other.destroy()
    engine.destroy()


@pytest.mark.parametrize("stage", [0, 3])
def test_buffers_and_weights_without_the_rest(stage):
    in_folder(2, weights_only, stage)


def other_names(folder, stage):
    engine = engine_of(WithBuffers(), stage)
    step(engine)
    engine.save_checkpoint(folder)
    other = engine_of(WithBuffers("renamed"), stage)
    before = {
        name: value.clone() for name, value in other.module_state_dict().items() if name != "_extra_state"
    }
    with pytest.raises(
        UsageError, match=r"missing in it: renamed.weight, renamed.bias; not in the model: layer.weight"
    ):
        other.load_checkpoint(folder)
    after = other.module_state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    other.load_checkpoint(folder, load_module_strict=False)

    def renaming(src, dst):
        dst.renamed.weight.copy_(src["layer.weight"])
        dst.renamed.bias.copy_(src["layer.bias"])

    with torch.no_grad():
        other.load_checkpoint(folder, custom_load_fn=renaming)
    mine, theirs = other.module_state_dict(), engine.module_state_dict()
    assert torch.equal(mine["renamed.weight"], theirs["layer.weight"])
    step(other)
    wide = engine_of(WithBuffers(width=5), stage)
    with pytest.raises(
        UsageError, match=r"layer.weight: expected shape \[5, 5\] of the model, but \[4, 4\] was saved"
    ):
        wide.load_checkpoint(folder)

    def widening(src, dst):
        dst.layer.weight[:4, :4].copy_(src["layer.weight"])

    with torch.no_grad():
        wide.load_checkpoint(folder, custom_load_fn=widening)
    assert torch.equal(wide.module_state_dict()["layer.weight"][:4, :4], theirs["layer.weight"])
    assert safe_get_full_optimizer_state(wide.module.layer.weight, "exp_avg") is None
    for one in (engine, other, wide):
        one.destroy()


def raising(folder):
    engine = engine_of(WithBuffers(), 3)
    engine.save_checkpoint(folder)

    def raised_on_the_second(src, dst):
        if dist.get_rank() == 1:
            raise ValueError("cannot convert")

    with pytest.raises(UsageError, match="custom_load_fn: ValueError: cannot convert"):
        engine.load_checkpoint(folder, custom_load_fn=raised_on_the_second)
    step(engine)
    engine.destroy()


def test_what_a_custom_function_raises_on_one_rank_is_raised_on_all():
    in_folder(2, raising)


@pytest.mark.parametrize("stage", [2, 3])
def test_weights_that_do_not_fit_are_named_before_anything_changes(stage):
    in_folder(2, other_names, stage)


def two_groups(model, reverse=False, unfreeze=False):
    model.gone.requires_grad_(unfreeze)
    rest = [p for n, p in model.named_parameters() if p.requires_grad and n != "layer.weight"]
    groups = [{"params": [model.layer.weight], "lr": 0.3}, {"params": rest, "lr": 0.01}]
    return torch.optim.AdamW(groups[::-1] if reverse else groups, weight_decay=0.5)


class UsesAll(WithBuffers):
    def forward(self, x):
        return super().forward(x) + self.gone.sum()


def other_groups(folder, stage):
    model = UsesAll()
    engine = engine_of(model, stage, two_groups(model))
    engine.optimizer.param_groups[0]["lr"] = 0.25
    step(engine)
    engine.save_checkpoint(folder)
    expected = safe_get_full_optimizer_state(model.layer.bias, "exp_avg")
    again = UsesAll()
    other = engine_of(again, stage, two_groups(again, reverse=True, unfreeze=True))
    other.load_checkpoint(folder)
    rates = {group["lr"] for group in other.optimizer.param_groups if group["lr"] > 0.1}
    assert rates == {0.25}
    assert torch.equal(safe_get_full_optimizer_state(again.layer.bias, "exp_avg"), expected)
    assert safe_get_full_optimizer_state(again.gone, "exp_avg") is None
    step(other)
    states = other.optimizer.state
    counts = {int(state["step"]) for state in states.values()}
    assert counts <= {1, 2}
    assert safe_get_full_optimizer_state(again.gone, "exp_avg") is not None
    other.destroy()
    engine.destroy()


@pytest.mark.parametrize("stage", [1, 3])
def test_states_follow_names_when_groups_are_reordered_and_parameters_unfrozen(stage):
    in_folder(2, other_groups, stage)


def trainable_only(folder, stage):
    engine = make_engine(stage, "bf16", model={"frozen": True})
    train(engine, range(2))
    engine.save_checkpoint(folder, exclude_frozen_parameters=True)
    expected = train(engine, [2])
    files = Path(folder).glob("*/*model_states.pt")
    names = {name for path in files for name in torch.load(path, weights_only=True)["module"]}
    assert ("embed.weight" in names) == (stage < 3)  # there the masters are the weights
    assert not any(name.startswith("blocks.0.") for name in names)
    other = make_engine(stage, "bf16", model={"frozen": True})
    other.load_checkpoint(folder)
    assert train(other, [2]) == expected
    engine.destroy()
    other.destroy()


@pytest.mark.parametrize("stage", [1, 3])
def test_a_checkpoint_of_the_trained_parameters_only_is_resumed_strictly(stage):
    in_folder(2, trainable_only, stage)


def under_one_name(folder):
    engine = make_engine(3)
    Path(folder, "tag").mkdir(exist_ok=True)
    Path(folder, "tag", "notes.txt").write_text("mine")
    for number in range(2):
        train(engine, [number])
        engine.save_checkpoint(folder, tag="tag")
        engine.save_checkpoint(folder, tag="deep/er")
        engine.save_checkpoint(Path(folder) / "flat", tag=".")
    expected = everything(engine)
    for place, tag in (("", "tag"), ("", "deep/er"), ("flat", ".")):
        other = make_engine(3, seed=3)
        other.load_checkpoint(Path(folder) / place, tag=tag)
        compare(everything(other), expected)
        other.destroy()
    assert Path(folder, "tag", "notes.txt").read_text() == "mine"
    assert sorted(os.listdir(folder)) == ["deep", "flat", "latest", "tag", "zero_to_fp32.py"]
    engine.destroy()


def test_a_tag_may_be_used_again_be_a_path_or_the_folder_itself():
    in_folder(2, under_one_name)


def born_sharded(folder):
    engine = make_engine(3, "bf16")
    train(engine, [0])
    engine.save_checkpoint(folder)
    config = {
        "train_micro_batch_size_per_gpu": 3,
        "zero_optimization": {"stage": 3},
        "bf16": {"enabled": True},
    }
    with deepspeed.zero.Init(config_dict_or_path=config):
        from toys import Toy

        model = Toy()
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    reader = deepspeed.initialize(model=model, config=config)[0]  # no optimizer: weights only
    reader.load_checkpoint(folder)
    mine, theirs = reader.module_state_dict(), engine.module_state_dict()
    assert all(torch.equal(value, mine[name]) for name, value in theirs.items())
    engine.destroy()
    reader.destroy()


def test_a_model_that_is_not_trained_reads_its_weights_from_any_checkpoint():
    in_folder(2, born_sharded)
