"""Whole fp32 weights come out of every checkpoint under their names, equal to plain PyTorch's, in bounded memory."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from harness import run_on_ranks
from original_cases import CASES, case_model
from safetensors.torch import load_file
from test_damage import flip
from test_original import FOLDER, truth_of
from torch import nn
from toys import toy_batch, toy_loss

import deepspeed
from deepspeed.errors import CheckpointError, UsageError
from deepspeed.utils.zero_to_fp32 import (
    convert_zero_checkpoint_to_fp32_state_dict,
    get_fp32_state_dict_from_zero_checkpoint,
    get_model_state_file,
    get_optim_files,
    load_state_dict_from_zero_checkpoint,
)
from deepspeed.zero.access import safe_get_full_fp32_param
from deepspeed.zero.gathered import GatheredParameters


class Model(nn.Module):
    """A model of odd sizes, with buffers, a scalar and an empty parameter.

    Args:
        kind: "odd"; "tied": the head is the embedding's; "frozen": a layer is not trained; "shared": a module
            stands under two names; "lora": nothing but two small matrices is trained.
    """

    def __init__(self, kind="odd"):
        super().__init__()
        self.embed = nn.Embedding(11, 5)
        self.first = nn.Linear(5, 5)
        self.wide = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 5))
        self.gain = nn.Parameter(torch.tensor(1.3))
        self.empty = nn.Parameter(torch.empty(0))
        self.head = nn.Linear(5, 11, bias=False)
        self.register_buffer("scale", torch.full((5,), 0.7))
        self.register_buffer("count", torch.tensor(2**40 + 1))
        self.again = self.first if kind == "shared" else nn.Identity()
        if kind == "tied":
            self.head.weight = self.embed.weight
        if kind == "frozen":
            self.wide.requires_grad_(False)
        self.adapter = None
        if kind == "lora":
            self.requires_grad_(False)
            self.adapter = nn.Sequential(nn.Linear(5, 2, bias=False), nn.Linear(2, 5, bias=False))

    def forward(self, tokens):
        hidden = self.again(self.first(self.embed(tokens)))
        hidden = hidden * self.scale.to(hidden.dtype)
        hidden = hidden + (self.wide if self.adapter is None else self.adapter)(hidden)
        return self.head(hidden * self.gain + self.empty.sum())


KINDS = ["odd", "tied", "frozen", "shared", "lora"]
TWICE = {"tied": {"head.weight": "embed.weight"}, "shared": {"again.weight": "first.weight"}}


def make_model(kind, seed=0):
    torch.manual_seed(seed)
    return Model(kind)


def make_trained(kind, stage, precision="bf16", **sections):
    """Return an engine and plain PyTorch beside it, both two steps old."""
    model = make_model(kind)
    plain = copy.deepcopy(model)
    trained = [param for param in model.parameters() if param.requires_grad]
    engine = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(trained, lr=0.1),
        config={
            "train_micro_batch_size_per_gpu": 3,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            **({} if precision == "fp32" else {precision: {"enabled": True}}),
            **sections,
        },
    )[0]
    adam = torch.optim.AdamW([param for param in plain.parameters() if param.requires_grad], lr=0.1)
    ranks = dist.get_world_size()
    for step in range(2):
        engine.backward(toy_loss(engine, toy_batch(step, 0, dist.get_rank())))
        engine.step()
        (sum(toy_loss(plain, toy_batch(step, 0, rank)) for rank in range(ranks)) / ranks).backward()
        adam.step()
        adam.zero_grad()
    return engine, plain


def fp32_of(engine):
    """Return what the engine has, whole: masters, else weights widened."""
    found = {}
    for name, param in engine.module.named_parameters(remove_duplicate=False):
        with GatheredParameters(param):
            master = safe_get_full_fp32_param(param) if param.requires_grad and param.numel() else None
            found[name] = (param if master is None else master).detach().float().clone()
    for name, buffer in engine.module.named_buffers():
        found[name] = buffer.float() if buffer.is_floating_point() else buffer.clone()
    return found


def in_folder(count, body, *args):
    with tempfile.TemporaryDirectory() as folder:
        run_on_ranks(count, body, folder, *args)


def assert_same(state, expected):
    assert set(state) == set(expected)
    for name, value in expected.items():
        assert state[name].dtype == value.dtype, name
        assert torch.equal(state[name], value), name


def comes_out_whole(folder, kind, stage, precision):
    engine, plain = make_trained(kind, stage, precision)
    expected = fp32_of(engine)
    engine.save_checkpoint(folder)
    engine.destroy()
    if dist.get_rank() != 0:
        return
    state = get_fp32_state_dict_from_zero_checkpoint(folder)
    assert_same(state, expected)
    for other, name in TWICE.get(kind, {}).items():
        assert state[other] is state[name]
    make_model(kind, seed=1).load_state_dict(state, strict=True)
    if precision == "fp32":
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-5, msg=name)
    lazy = get_fp32_state_dict_from_zero_checkpoint(folder, tag="global_step2", lazy_mode=True)
    assert {name: (one.shape, one.dtype) for name, one in lazy.items()} == {
        name: (one.shape, one.dtype) for name, one in expected.items()
    }
    assert_same({name: one.contiguous() for name, one in lazy.items()}, expected)
    trained = get_fp32_state_dict_from_zero_checkpoint(folder, exclude_frozen_parameters=True)
    frozen = {name for name, param in plain.named_parameters() if not param.requires_grad}
    assert_same(trained, {name: value for name, value in expected.items() if name not in frozen})
    loaded = load_state_dict_from_zero_checkpoint(make_model(kind, seed=1).double(), folder)
    assert_same(loaded.state_dict(), {name: _double(value) for name, value in expected.items()})
    files = get_optim_files(Path(folder) / "global_step2")
    states = torch.load(files[0], weights_only=True)["optimizer_state_dict"]
    assert len(files) == dist.get_world_size()
    assert states["zero_stage"] == stage
    main = torch.load(get_model_state_file(Path(folder) / "global_step2", stage), weights_only=True)
    assert main["global_steps"] == 2


def _double(value):
    return value.double() if value.is_floating_point() else value


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_of_every_stage_is_there_and_loads_strictly(kind, stage):
    in_folder(2, comes_out_whole, kind, stage, "bf16")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("ranks", "stage"), [(1, 2), (2, 3)])
def test_weights_equal_those_of_plain_pytorch(kind, ranks, stage):
    in_folder(ranks, comes_out_whole, kind, stage, "fp32")


def converted(folder, stage):
    engine, _ = make_trained("tied", stage)
    engine.save_checkpoint(folder)
    engine.destroy()
    if dist.get_rank() != 0:
        return
    expected = get_fp32_state_dict_from_zero_checkpoint(folder)
    out = Path(folder) / "out"
    for safe, shards in ((False, 0), (False, 3), (True, 3), (True, 0)):
        convert_zero_checkpoint_to_fp32_state_dict(folder, out, 300 if shards else "5GB", safe)
        suffix, stem = ("safetensors", "model") if safe else ("bin", "pytorch_model")
        files = sorted(path.name for path in out.glob(f"*.{suffix}"))
        assert files == (
            [f"{stem}-0000{n}-of-0000{shards}.{suffix}" for n in range(1, shards + 1)]
            if shards
            else [f"{stem}.{suffix}"]
        )
        state = {}
        for name in files:
            state |= load_file(out / name) if safe else torch.load(out / name, weights_only=True)
        assert_same(
            state, {name: one for name, one in expected.items() if not (safe and name == "head.weight")}
        )
        if not shards and not safe:
            assert state["head.weight"].data_ptr() == state["embed.weight"].data_ptr()
    assert sorted(path.name for path in out.iterdir()) == [
        "model.safetensors",
        *(f"pytorch_model-0000{n}-of-00003.bin" for n in (1, 2, 3)),
        "pytorch_model.bin.index.json",
    ]


@pytest.mark.parametrize("stage", [1, 3])
def test_files_are_cut_by_size_and_take_the_place_of_earlier_ones(stage):
    in_folder(2, converted, stage)


def small_checkpoint(folder):
    engine, _ = make_trained("lora", 3)
    engine.save_checkpoint(folder, exclude_frozen_parameters=True)
    engine.destroy()


def test_frozen_weights_that_were_left_out_are_named(monkeypatch):
    with tempfile.TemporaryDirectory() as folder:
        run_on_ranks(2, small_checkpoint, folder)
        with pytest.raises(UsageError, match=r"gain and 9 more are not in it.*--exclude_frozen"):
            get_fp32_state_dict_from_zero_checkpoint(folder)
        state = get_fp32_state_dict_from_zero_checkpoint(folder, exclude_frozen_parameters=True)
        assert set(state) == {"adapter.0.weight", "adapter.1.weight", "scale", "count"}
        base = make_model("lora", seed=5)
        expected = {**base.state_dict(), **state}
        said = []
        monkeypatch.setattr("deepspeed.checkpoint.zero_to_fp32.announce", said.append)
        assert load_state_dict_from_zero_checkpoint(base, folder) is base
        assert_same(base.state_dict(), expected)
        assert len(said) == 1
        assert "gain and 9 more are not in it; the model's own stay" in said[0]


def one_checkpoint(folder):
    engine, _ = make_trained("frozen", 1)
    engine.save_checkpoint(folder)
    engine.destroy()


@pytest.fixture
def checkpoint(tmp_path):
    run_on_ranks(1, one_checkpoint, str(tmp_path))
    return tmp_path


def script(folder, *args):
    return subprocess.run([sys.executable, *args], cwd=folder, capture_output=True, text=True, timeout=120)


def test_the_script_beside_the_checkpoints_runs_alone(checkpoint):
    assert os.access(checkpoint / "zero_to_fp32.py", os.X_OK)
    ran = script(
        checkpoint, "zero_to_fp32.py", ".", "out", "--safe_serialization", "-t", "global_step2", "-d"
    )
    assert ran.returncode == 0, ran.stderr
    assert "SavedTensor(embed.weight, shape=(11, 5), dtype=torch.float32)" in ran.stderr
    assert_same(
        load_file(checkpoint / "out" / "model.safetensors"),
        get_fp32_state_dict_from_zero_checkpoint(checkpoint),
    )
    ran = script(
        checkpoint, "zero_to_fp32.py", ".", "out", "--max_shard_size=1KB", "--exclude_frozen_parameters"
    )
    assert ran.returncode == 0, ran.stderr
    assert (checkpoint / "out" / "pytorch_model.bin").is_file()
    ran = script(checkpoint, "zero_to_fp32.py", "nowhere", "out")
    assert ran.returncode == 2
    assert ran.stderr.startswith("zero_to_fp32.py: checkpoint_dir: expected a folder of checkpoints")


def test_damage_is_an_error_that_names_the_file_and_leaves_nothing(checkpoint):
    out = checkpoint / "out"
    path = checkpoint / "global_step2" / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
    flip(path, path.stat().st_size // 3)
    for safe in (False, True):
        with pytest.raises(CheckpointError, match=rf"{path.name}: damaged"):
            convert_zero_checkpoint_to_fp32_state_dict(checkpoint, out, safe_serialization=safe)
        assert list(out.iterdir()) == []
    with pytest.raises(CheckpointError, match=rf"{path.name}: damaged"):
        load_state_dict_from_zero_checkpoint(make_model("frozen"), checkpoint)
    path.unlink()
    with pytest.raises(CheckpointError, match=rf"{path.name}: missing"):
        get_fp32_state_dict_from_zero_checkpoint(checkpoint)


def test_the_folder_of_one_checkpoint_is_enough_and_a_wrong_one_is_named(checkpoint):
    assert get_fp32_state_dict_from_zero_checkpoint(checkpoint / "global_step2").keys()
    with pytest.raises(
        UsageError, match=r"there is no tag 'best' in .*newest whole checkpoint: tag=\"global"
    ):
        get_fp32_state_dict_from_zero_checkpoint(checkpoint, tag="best")
    with pytest.raises(UsageError, match=r"max_shard_size: expected bytes or a size such as '5GB'.*'much'"):
        convert_zero_checkpoint_to_fp32_state_dict(checkpoint, checkpoint / "out", "much")
    with pytest.raises(CheckpointError, match=r"mp_rank_00_model_states.pt: missing"):
        get_model_state_file(checkpoint, 2)
    with pytest.raises(CheckpointError, match="there is no"):
        get_optim_files(checkpoint)


@pytest.mark.parametrize("name", sorted(CASES))
def test_weights_of_the_original_s_checkpoints_come_out_too(name):
    state = get_fp32_state_dict_from_zero_checkpoint(FOLDER / name)
    for key, master in truth_of(name)["now"]["master"].items():
        assert state[key].dtype == torch.float32
        torch.testing.assert_close(state[key], master.float(), rtol=0, atol=0, msg=key)
    lazy = get_fp32_state_dict_from_zero_checkpoint(FOLDER / name, lazy_mode=True)
    assert_same({key: one.contiguous() for key, one in lazy.items()}, state)
    case = CASES[name]
    if not case.get("left_out"):
        case_model(case, seed=1).load_state_dict(state, strict=True)
    loaded = load_state_dict_from_zero_checkpoint(case_model(case, seed=1).float(), FOLDER / name)
    for key, value in state.items():
        assert torch.equal(loaded.state_dict()[key], value), key


class Evil:
    def __reduce__(self):
        return os.system, ("touch ran",)


def test_nothing_of_a_checkpoint_is_run(checkpoint, monkeypatch):
    monkeypatch.chdir(checkpoint)
    for path in (checkpoint / "global_step2").glob("*.pt"):
        torch.save({"module": Evil(), "optimizer_state_dict": Evil()}, path)
    with pytest.raises(CheckpointError):
        get_fp32_state_dict_from_zero_checkpoint(checkpoint)
    assert not (checkpoint / "ran").exists()


LARGE = 4
WIDTH = 3 * 2**10


def large_checkpoint(folder):
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LARGE)))
    model.to_empty(device="cpu").bfloat16()
    for param in model.parameters():
        nn.init.constant_(param, 0.5)
    config = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}}
    engine = deepspeed.initialize(model=model, config=config)[0]
    engine.save_checkpoint(folder)
    engine.destroy()


GROWTH = """
import sys
from deepspeed.utils.zero_to_fp32 import main

def high_water():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) // 1024

before = high_water()
main(sys.argv[1:])
print(high_water() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_a_large_checkpoint_is_converted_a_range_at_a_time(tmp_path):
    run_on_ranks(1, large_checkpoint, str(tmp_path))
    total = LARGE * WIDTH**2 * 4 // 2**20
    assert total >= 144
    for options in ([], ["--safe_serialization"]):
        ran = script(tmp_path, "-c", GROWTH, ".", "out", *options)
        assert ran.returncode == 0, ran.stderr
        assert int(ran.stdout.split()[-1]) < total // 2
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > total * 2**20
