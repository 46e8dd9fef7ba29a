"""Saved weights are complete at every stage, and transformers reads them back to the byte."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import tempfile
import textwrap
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from checkpoint_runs import make_engine, train
from collectives import gathers_are_collectives
from harness import run_on_ranks
from safetensors import safe_open
from safetensors.torch import load_file
from test_damage import flip, on_first, refusal
from test_saving_later import SCRIPT, run_script
from torch import nn

import deepspeed
from deepspeed.checkpoint.records import Room
from deepspeed.checkpoint.safetensors_file import SafetensorsWriter
from deepspeed.checkpoint.weight_files import Entry, WeightFiles, size_in_bytes
from deepspeed.errors import CheckpointError, UsageError
from deepspeed.offload.disk import Disk


def in_folder(count, body, *args):
    with tempfile.TemporaryDirectory() as folder:
        run_on_ranks(count, body, folder, *args)


CONFIG = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 29,
    "tie_word_embeddings": True,
}

READ_BACK = """
import sys, torch, transformers
expected, *folders = sys.argv[1:]
expected = torch.load(expected, weights_only=True)
for folder in folders:
    model, found = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(found.values()), (folder, found)
    state = model.state_dict()
    assert state.keys() == expected.keys(), (folder, state.keys() ^ expected.keys())
    for name, value in expected.items():
        assert value.dtype == state[name].dtype and torch.equal(value, state[name]), (folder, name)
assert "deepspeed" not in sys.modules
"""


def read_back(place, expected, config, *names):
    """Compare, in a process that knows nothing of this package, what transformers reads."""
    for name in names:
        config.save_pretrained(place / name)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", READ_BACK, str(expected), *names]
    ran = subprocess.run(command, env=environment, cwd=place, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr


def llama(folder, stage):
    config = transformers.LlamaConfig(**CONFIG)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    engine = deepspeed.initialize(
        model=model,
        config={
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": True},
            "optimizer": {"type": "AdamW", "params": {"lr": 0.1}},
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "checkpoint": {"save_safetensors": True},
        },
    )[0]
    tokens = torch.randint(0, 29, (1, 6), generator=torch.Generator().manual_seed(dist.get_rank()))
    engine.backward(engine(input_ids=tokens, labels=tokens).loss)
    engine.step()
    place = Path(folder)
    engine.save_checkpoint(folder, tag="tag")
    engine.save_checkpoint(folder, tag="tag")
    engine.save_16bit_model(place / "one", "model.safetensors")
    engine.save_16bit_model(place / "cut", "model.safetensors", max_shard_size="1KB")
    engine.save_16bit_model(place / "torch", "pytorch_model.bin", max_shard_size="5KB")
    expected = {name: value.clone() for name, value in engine.module_state_dict().items()}
    if dist.get_rank() == 0:
        torch.save(expected, place / "expected.pt")
        read_back(place, place / "expected.pt", config, "tag", "one", "cut", "torch")
        assert len(list((place / "cut").glob("*.safetensors"))) > 5
        with safe_open(place / "tag" / "model.safetensors", "pt") as file:
            assert file.metadata() == {"format": "pt"}
            assert "lm_head.weight" not in file.keys()  # noqa: SIM118
        index = json.loads((place / "cut" / "model.safetensors.index.json").read_text())
        total = sum(value.nbytes for name, value in expected.items() if name != "lm_head.weight")
        assert index["metadata"] == {"total_size": total}
    dist.barrier()
    assert engine.load_checkpoint(folder)[0] == str(place / "tag")
    engine.destroy()


@pytest.mark.parametrize("stage", [0, 3])
def test_transformers_reads_saved_weights_in_a_fresh_process(stage):
    in_folder(2, llama, stage)


def verified(folder):
    engine = make_engine(3, "bf16", model={"tied": True, "frozen": True})
    engine.settings.checkpoint.save_safetensors = True
    train(engine, [0])
    engine.save_checkpoint(folder, exclude_frozen_parameters=True)
    path = Path(folder) / "global_step1" / "model.safetensors"
    names = set(engine.module_state_dict(exclude_frozen_parameters=True)) - {"head.weight"}
    assert set(load_file(path)) == names
    dist.barrier()
    on_first(lambda: flip(path, path.stat().st_size - 1))
    assert "model.safetensors: damaged" in refusal(engine, folder)
    on_first(path.unlink)
    assert "model.safetensors: missing" in refusal(engine, folder)
    engine.destroy()


def test_safetensors_in_a_checkpoint_are_verified_with_it():
    in_folder(2, verified)


def full(folder, collectives):
    with gathers_are_collectives() if collectives else nullcontext():
        engine = make_engine(3)
    append = WeightFiles.append

    def fails(self, name, values):
        if name == "gain":
            raise OSError(28, "No space left on device")
        append(self, name, values)

    WeightFiles.append = fails
    try:
        with pytest.raises(CheckpointError, match=r"save_16bit_model: OSError: .*No space left"):
            engine.save_16bit_model(folder, "model.safetensors")
        engine.settings.checkpoint.save_safetensors = True
        with pytest.raises(CheckpointError, match="No space left"):
            engine.save_checkpoint(folder)
    finally:
        WeightFiles.append = append
    dist.barrier()
    assert os.listdir(folder) == []
    dist.barrier()
    engine.save_16bit_model(folder, "model.safetensors")
    engine.save_16bit_model(folder)
    expected = engine.module_state_dict()
    if dist.get_rank() == 0:
        for state in (
            load_file(f"{folder}/model.safetensors"),
            torch.load(f"{folder}/pytorch_model.bin", weights_only=True),
        ):
            assert state.keys() == expected.keys()
            assert all(torch.equal(value, state[name]) for name, value in expected.items())
    engine.destroy()


@pytest.mark.parametrize("collectives", [False, True], ids=["arena", "collectives"])
def test_a_full_disk_is_an_error_on_every_rank_leaves_nothing_and_hangs_nobody(collectives):
    in_folder(2, full, collectives)


def test_a_save_in_the_background_writes_safetensors_at_the_end_of_the_script(tmp_path):
    script = textwrap.dedent(SCRIPT).format(folder=str(tmp_path), end="expected = engine.module.state_dict()")
    script = script.replace('"decoupled": True}', '"decoupled": True}, "save_safetensors": True')
    script += f"torch.save(expected, {str(tmp_path / 'expected.pt')!r})\n"
    ended = run_script(script)
    assert ended.returncode == 0, ended.stderr
    state = load_file(tmp_path / "global_step1" / "model.safetensors")
    expected = torch.load(tmp_path / "expected.pt", weights_only=True)
    assert all(torch.equal(value, state[name]) for name, value in expected.items())


LAYERS, WIDTH = 64, 2**10


def high_water():
    """Megabytes that this process had in memory at most, since it was last reset."""
    text = Path("/proc/self/status").read_text()
    return int(text.split("VmHWM:")[1].split()[0]) // 1024


def streamed(folder):
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.bfloat16) for _ in range(LAYERS)))
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    engine = deepspeed.initialize(model=model, config=config)[0]
    engine.save_16bit_model(folder, "small.safetensors", max_shard_size="1KB")
    Path("/proc/self/clear_refs").write_text("5")
    before = high_water()
    for name in ("model.safetensors", "pytorch_model.bin"):
        engine.save_16bit_model(folder, name)
        total = LAYERS * WIDTH**2 * 2 // 2**20
        assert high_water() - before < total // 4, (name, high_water() - before, total)
    engine.destroy()


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="memory is read from /proc")
def test_sharded_weights_are_saved_a_tensor_at_a_time():
    in_folder(2, streamed)


def test_a_disk_that_refuses_to_remove_files_does_not_hide_why_they_were_not_written(tmp_path, monkeypatch):
    def refused(self, missing_ok=False):
        raise OSError(errno.EROFS, "Read-only file system")

    files = WeightFiles(tmp_path, "model.safetensors", [Entry(("a",), (1,), torch.float32)])
    monkeypatch.setattr(Path, "unlink", refused)
    files.abandon()


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        (None, None),
        (7, 7),
        ("5GB", 5 * 10**9),
        ("200 mb", 2 * 10**8),
        ("1KiB", 1024),
        ("12B", 12),
        ("3k", 3000),
    ],
)
def test_a_size_is_bytes_or_text(text, nbytes):
    assert size_in_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "GB", "1.5GB", "-1", 0, "5XB", "5iB"])
def test_another_size_is_refused(text):
    with pytest.raises(UsageError, match=r"max_shard_size: expected bytes or a size"):
        size_in_bytes(text)


def test_any_dtype_and_shape_is_read_as_it_was_written(tmp_path):
    values = {
        "bytes": torch.arange(3, dtype=torch.uint8),
        "half": torch.arange(5).half(),
        "number": torch.tensor(1.5, dtype=torch.float64),
        "none": torch.empty(0, 3),
        "größe": torch.tensor([[True, False]]),
        "brain": torch.randn(2, 3).bfloat16(),
    }
    rooms = {name: Room(tuple(value.shape), value.dtype) for name, value in values.items()}
    writer = SafetensorsWriter(tmp_path / "file.safetensors", rooms, Disk())
    for name, value in values.items():
        writer.append(rooms[name], value)
    entry = writer.close()
    assert entry.size == (tmp_path / "file.safetensors").stat().st_size
    read = load_file(tmp_path / "file.safetensors")
    assert read.keys() == values.keys()
    assert all(
        torch.equal(read[name], value) and read[name].dtype == value.dtype for name, value in values.items()
    )
    with pytest.raises(UsageError, match=r"odd: safetensors holds no torch.complex128"):
        SafetensorsWriter(tmp_path / "odd.safetensors", {"odd": Room((1,), torch.complex128)}, Disk())
